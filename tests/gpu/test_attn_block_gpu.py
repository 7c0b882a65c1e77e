"""A whole block of linear attention in two kernels, on a real GPU: against its formula in float64, in runs of every length."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops_checks import poisoned_outputs
from test_ops_attn_block import FORMS, exact, near, problem

from shiftaddvit.ops.attn_block import attn_block, fits
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix
from shiftaddvit.ops.norm_linear import route_rows
from shiftaddvit.ops.tiling import Tile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"),
]
SIZES = ((1, 49), (3, 49), (2, 117), (32, 196), (3, 784), (1, 3136), (5, 3136), (2, 1500), (9, 1), (2, 63), (1, 65))


def prepared(batch, tokens, first, second, channels=32, dtype=torch.bfloat16, **more):
    """Arguments on the GPU, routers as the kernels read them; tokens rounded to `dtype`."""
    x, heads, norm, eps, qkv, conv, proj = problem(batch, tokens, first, second, channels, dtype=torch.float16, **more)
    gpu = lambda *tensors: tuple(t.cuda() if t is not None else None for t in tensors)  # noqa: E731
    qkv, proj = ((*gpu(weight, bias), router) for weight, bias, router in (qkv, proj))
    plain = gpu(qkv[2], proj[2])
    rows = [route_rows(router, torch.float16) if router is not None else None for router in plain]
    x, (conv,) = x.cuda().to(dtype), gpu(conv)
    both = [(x, heads, gpu(*norm), eps, (*qkv[:2], r[0]), conv, (*proj[:2], r[1])) for r in (rows, plain)]
    return both[0], both[1]


@pytest.fixture
def runs(monkeypatch):
    """Sets the longest run of the second kernel, of the first one if asked, and tiles of 16 tokens a step and warp."""
    from shiftaddvit.ops.attn_block import triton

    def use(longest, tiles, contexts=64):
        monkeypatch.setattr(
            triton, "attn_tile", lambda kernel, *_: Tile(64, 32, contexts, 4) if kernel == "context" else Tile(64 * tiles, 32, longest, 4)
        )

    return use


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second", "channels"), [(1, 1, 32), (2, 2, 32), (2, 1, 32), (1, 2, 32), (1, 1, 64), (2, 2, 64)])
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_attn_block(batch, tokens, first, second, channels, dtype):
    arguments, plain = prepared(batch, tokens, first, second, channels, dtype)
    assert fits(arguments[0], channels // 32, arguments[4][0], arguments[6][0], 9)
    with poisoned_outputs():
        y = attn_block(*arguments)
    near(y, exact(*plain, narrow=True), 2 in (first, second), 5e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(("window", "shared", "channels"), [(9, False, 32), (17, True, 32), (0, False, 64), (3, True, 64)])
def test_every_form(window, shared, channels, tiles, form, runs):
    arguments, plain = prepared(2, 150, 2, 2, channels, window=window, shared=shared)
    runs(2, tiles)
    near(attn_block(*arguments, **form), exact(*plain, narrow=True, **form), True, 5e-3)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize(("batch", "tokens"), [(3, 3136), (5, 117), (3, 784)])
def test_runs_of_every_length_give_the_same_bits(batch, tokens, channels, experts, runs):
    arguments, plain = prepared(batch, tokens, experts, experts, channels)
    expected = None
    for longest in (64, 16, 8, 4, 2, 1):
        for tiles in (1, 2):
            runs(longest, tiles)
            with poisoned_outputs():
                y = attn_block(*arguments)
            expected = y if expected is None else expected
            assert torch.equal(y, expected), (longest, tiles)
    for contexts in (16, 4, 1):
        runs(16, 1, contexts)
        near(attn_block(*arguments), exact(*plain, narrow=True), True, 5e-3)


@pytest.mark.parametrize(("tokens", "channels"), [(3136, 32), (784, 64)])
def test_many_runs_are_the_same_run(tokens, channels):
    arguments, _ = prepared(128, tokens, 2, 2, channels)
    expected = attn_block(*arguments)
    encoded = attention_encode(arguments[0], arguments[4][0], channels // 32, arguments[4][1], *arguments[2:4], arguments[4][2])
    near(attention_mix(encoded, *arguments[6], residual=arguments[0], conv=arguments[5])[0], expected.double(), True, 8e-3)
    for _ in range(20):
        assert torch.equal(attn_block(*arguments), expected)


def test_batch_mates_change_nothing():
    (x, *rest), _ = prepared(4, 3136, 2, 2)
    expected = attn_block(x, *rest)
    assert torch.equal(attn_block(torch.stack([x[3] * 50, x[1], x[0], x[2]]), *rest)[1:], expected[[1, 0, 2]])


@pytest.mark.parametrize("channels", [32, 64])
def test_programmatic_launches_change_nothing(channels):
    (x, *rest), _ = prepared(4, 784, 2, 2, channels)

    def chain(pdl):
        y = x
        for _ in range(6):
            y = attn_block(y, *rest, pdl=pdl)
        return y

    expected = chain(False)
    for _ in range(5):
        assert torch.equal(chain(True), expected)


def test_nan_stays_in_its_picture():
    arguments, _ = prepared(3, 784, 2, 2)
    arguments[0][1, 400] = float("nan")
    y = attn_block(*arguments)
    assert y[[0, 2]].isfinite().all() and y[1, 400].isnan().all()
