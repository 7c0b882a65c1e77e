"""A whole block of linear attention in one op: the reference is the block in float64, and the kernels' own Python, run with torch in place of
Gluon, is the reference for pictures of every size, however they are cut into runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, pick, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.attn_block import attn_block, fits
from shiftaddvit.ops.conv_mlp.gluon import has_gluon
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix
from shiftaddvit.ops.norm_linear import route_rows
from shiftaddvit.ops.tiling import Tile

needs_gluon = pytest.mark.skipif(not has_gluon(), reason="needs a Triton that has Gluon")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def problem(batch, tokens, first, second, channels=32, heads=None, window=9, shared=False, dtype=torch.float32):
    """Arguments of `attn_block`."""
    heads, outputs = heads or channels // 32, (2 if shared else 3) * channels
    linear = lambda experts, n, seed: (  # noqa: E731
        (random(experts, n, channels, seed=seed) * channels**-0.5).to(dtype), random(experts, n, seed=seed) * 0.5,
        random(2, channels, seed=seed) if experts == 2 else None,
    )  # fmt: skip
    conv = random(heads, window) * 0.3 if window else None
    norm = random(channels) + 1, random(channels, seed=1)
    return random(batch, tokens, channels).to(dtype), heads, norm, 1e-6, linear(first, outputs, 2), conv, linear(second, channels, 3)


def exact(x, heads, norm, eps, qkv, conv, proj, rule="token", codes="zero-one", local="own", context_mean=True, output_unit=True, narrow=False):
    """In float64; `narrow` rounds what is rounded on the way to float16 here too, so that codes and routes are the same."""
    rounded = lambda t: t.half().double() if narrow else t  # noqa: E731
    batch, tokens, channels = x.shape
    a = rounded(F.layer_norm(x.double(), (channels,), norm[0].double(), norm[1].double(), eps))
    parts = rounded(pick(a, qkv)).unflatten(2, (-1, heads, channels // heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts[0], parts[-2], parts[-1]
    low = -1.0 if codes == "plus-minus" else 0.0
    q, k = (torch.where(t > (t.mean(-1, keepdim=True) if rule == "token" else 0), 1.0, low).double() for t in (q, k))
    o = q @ (k.transpose(2, 3) @ v) / math.pi / (tokens if context_mean else 1)
    o = o + v / 2 if local == "own" else o + v.mean(2, keepdim=True) / 2 if local == "mean" else o
    o = o / (o.square().sum(-1, keepdim=True) + 1e-12).sqrt() if output_unit else o
    if conv is not None:
        o = o + F.conv2d(v, conv.double()[:, None, :, None], padding=(conv.shape[1] // 2, 0), groups=heads)
    return x.double() + pick(rounded(o.transpose(1, 2).flatten(2)), proj)


FORMS = (
    {}, {"rule": "zero"}, {"codes": "plus-minus"}, {"local": "none"}, {"context_mean": False}, {"output_unit": False},
    {"rule": "zero", "codes": "plus-minus", "local": "none", "context_mean": False, "output_unit": False},
)  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, {"local": "mean"}])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2)])
def test_it_is_the_block(first, second, form):
    arguments = problem(2, 35, first, second, channels=48, heads=3)
    arguments = (arguments[0].double(), *arguments[1:])
    assert error(attn_block(*arguments, **form), exact(*arguments, **form)) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [0, 1, 9])
def test_it_is_the_two_ops(window, shared):
    x, heads, norm, eps, qkv, conv, proj = problem(3, 49, 2, 1, window=window, shared=shared, dtype=torch.float16)
    x = x.bfloat16()
    y = attn_block(x, heads, norm, eps, qkv, conv, proj)
    encoded = attention_encode(x, qkv[0], heads, qkv[1], norm, eps, qkv[2])
    assert y.dtype == x.dtype and torch.equal(y, attention_mix(encoded, *proj, residual=x, conv=conv)[0])


@pytest.fixture
def emulated(monkeypatch):
    """Makes the op's launches run the kernels' Python on the CPU, with runs of at most so many steps of 16 or 32 tokens a warp."""
    from gluon_emulation import Emulated

    from shiftaddvit.ops.attn_block import apply, context, pieces, triton

    monkeypatch.setattr(triton, "attn_context_kernel", Emulated(context.attn_context_kernel, pieces, context))
    monkeypatch.setattr(triton, "attn_apply_kernel", Emulated(apply.attn_apply_kernel, pieces, context, apply))

    def run(arguments, longest=64, tiles=1, parts=None, stages=1, rule="token", codes="zero-one", local="own", context_mean=True, output_unit=True):
        x, heads, norm, eps, qkv, conv, proj = arguments
        usual, first = Tile(64 * tiles, 32, longest, 4, stages), Tile(64, 32, parts or longest, 4)
        monkeypatch.setattr(triton, "attn_tile", lambda kernel, *_: first if parts and kernel == "context" else usual)
        qkv, proj = ((weight, bias, route_rows(router, torch.float16) if router is not None else None) for weight, bias, router in (qkv, proj))
        with poisoned_outputs():
            return triton.attn_block(x, eps, *norm, *qkv, conv, *proj, heads, rule, codes, local, context_mean, output_unit)

    return run


def near(y, expected, routed=True, limit=3e-3):
    """A row whose codes or experts are as good as undecided may be another one."""
    rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert y.isfinite().all() and (rows > 0.02).float().mean() <= (0.03 if routed else 0.01)
    assert error(y[rows <= 0.02], expected[rows <= 0.02]) < limit


@needs_gluon
@pytest.mark.parametrize(
    ("batch", "tokens", "first", "second", "channels", "longest", "tiles"),
    [
        (1, 49, 1, 1, 32, 64, 1), (3, 49, 2, 2, 32, 1, 1), (2, 117, 2, 1, 32, 1, 2), (1, 3136, 1, 2, 32, 16, 1), (1, 1000, 2, 2, 32, 4, 2),
        (1, 784, 1, 1, 64, 2, 1), (2, 117, 2, 2, 64, 1, 1), (2, 130, 2, 1, 64, 64, 2), (9, 1, 2, 2, 32, 64, 1), (2, 7, 1, 1, 64, 64, 2),
        (1, 63, 1, 1, 32, 2, 1), (2, 65, 1, 2, 32, 1, 1), (1, 8, 1, 1, 32, 1, 1), (1, 1500, 1, 1, 32, 1, 1),
    ],
)  # fmt: skip
def test_the_kernels_without_gluon_are_the_reference(emulated, batch, tokens, first, second, channels, longest, tiles):
    arguments = problem(batch, tokens, first, second, channels, dtype=torch.float16)
    near(emulated(arguments, longest, tiles), exact(*arguments, narrow=True), 2 in (first, second))


@needs_gluon
@pytest.mark.parametrize(
    ("window", "shared", "channels", "tiles", "form"),
    [(9, False, 32, 1, form) for form in FORMS] + [(17, True, 32, 2, FORMS[6]), (0, False, 64, 1, {}), (3, True, 64, 2, FORMS[2])],
)
def test_every_form_without_gluon(emulated, window, shared, channels, tiles, form):
    arguments = problem(2, 150, 2, 2, channels, window=window, shared=shared, dtype=torch.float16)
    near(emulated(arguments, 1, tiles, stages=tiles, **form), exact(*arguments, narrow=True, **form))


@needs_gluon
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_of_every_length_give_the_same_bits(emulated, dtype):
    x, *rest = problem(2, 150, 2, 2, dtype=torch.float16)
    x = x.to(dtype)
    expected = emulated((x, *rest), 64)
    assert expected.dtype == dtype
    # Contexts are sums over the same parts: only the second kernel's runs change.
    for longest, tiles, stages in ((1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)):
        assert torch.equal(emulated((x, *rest), longest, tiles, 64, stages), expected), (longest, tiles, stages)


@needs_gluon
def test_batch_mates_change_nothing(emulated):
    x, *rest = problem(3, 117, 2, 2, dtype=torch.float16)
    together = emulated((x, *rest), 2)
    mixed = emulated((torch.stack([100 * x[2], x[1], x[0]]), *rest), 2)
    for number, there in ((0, 2), (1, 1)):
        assert torch.equal(emulated((x[number : number + 1], *rest), 2)[0], together[number])
        assert torch.equal(mixed[there], together[number])


@needs_gluon
def test_nan_stays_in_its_picture(emulated):
    arguments = problem(2, 100, 2, 2, dtype=torch.float16)
    arguments[0][1, 40, 3] = float("nan")
    y = emulated(arguments, 1)
    assert y[0].isfinite().all() and y[1, 40].isnan().all()
    near(y[:1], exact(*arguments, narrow=True)[:1])


@needs_gluon
@pytest.mark.slow
def test_the_compiled_kernels_are_the_reference(tmp_path):
    # A program of its own, because this one runs kernels in Triton's interpreter; a fresh cache, so that the compiler is what is tested.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).parent / "ops_run.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 4
    for case in cases:
        assert case["finite"] and case["worst"] < 0.02 and case["median"] < (3e-3 if "bfloat16" in case["case"] else 5e-4), case


def test_opcheck_and_compile():
    x, heads, norm, eps, qkv, conv, proj = problem(2, 9, 2, 1)
    form = (heads, "token", "zero-one", "own", True, True, False, "reference")
    torch.library.opcheck(torch.ops.shiftaddvit.attn_block.default, (x, eps, *norm, *qkv, conv, *proj, *form))
    compiled = torch.compile(lambda x: attn_block(x, heads, norm, eps, qkv, conv, proj), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), attn_block(x, heads, norm, eps, qkv, conv, proj))
    assert attn_block(x[:0], heads, norm, eps, qkv, conv, proj).shape == (0, 9, 32)


def test_mistakes_say_what_is_wrong():
    x, heads, norm, eps, qkv, conv, proj = problem(1, 9, 1, 2)
    with pytest.raises(UserError, match=r"x must be \(B, N, C\)"):
        attn_block(x[0], heads, norm, eps, qkv, conv, proj)
    with pytest.raises(UserError, match=r"qkv must have a weight \(1 or 2 experts, 96 or 64, 32\)"):
        attn_block(x, heads, norm, eps, proj, conv, proj)
    with pytest.raises(UserError, match="proj needs a router"):
        attn_block(x, heads, norm, eps, qkv, conv, (*proj[:2], None))
    with pytest.raises(UserError, match=r"conv must be \(1, odd window\)"):
        attn_block(x, heads, norm, eps, qkv, conv[:, :8], proj)
    with pytest.raises(UserError, match=r"norm bias must be \(32,\)"):
        attn_block(x, heads, (norm[0], norm[1][:8]), eps, qkv, conv, proj)
    with pytest.raises(UserError, match="rule"):
        attn_block(x, heads, norm, eps, qkv, conv, proj, rule="given")
    with pytest.raises(UserError, match="heads must divide"):
        attn_block(x, 3, norm, eps, qkv, conv, proj)
    assert not fits(x, heads, qkv[0], proj[0], 9)
    with pytest.raises(UserError, match="backend 'triton' cannot run"):
        attn_block(x, heads, norm, eps, qkv, conv, proj, backend="triton")
