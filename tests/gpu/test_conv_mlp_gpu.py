"""PVTv2's whole MLP in one kernel, on a real GPU: against its parts in float64, in strips of every height."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops_checks import error, poisoned_outputs

from shiftaddvit.ops.conv_mlp import conv_mlp, fits
from shiftaddvit.ops.norm_linear import route_rows
from shiftaddvit.ops.tiling import Tile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"),
]
SIZES = ((1, 7, 7), (3, 7, 7), (3, 14, 14), (32, 14, 14), (3, 28, 28), (1, 56, 56), (3, 56, 56), (32, 56, 56), (3, 13, 9), (2, 5, 64), (9, 1, 1))


def problem(batch, height, width, first, second, dtype, channels=32):
    """Arguments of `conv_mlp`."""
    torch.manual_seed(batch + height + width)
    normal = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    linear = lambda experts, n, k: (  # noqa: E731
        (normal(experts, n, k) * k**-0.5).half(), normal(experts, n), route_rows(normal(2, k), torch.float16) if experts == 2 else None,
    )  # fmt: skip
    hidden = 8 * channels
    x, norm = normal(batch, height * width, channels).to(dtype), (normal(channels) + 1, normal(channels))
    conv = (normal(9, hidden) * 0.3).half(), normal(hidden)
    return x, height, width, norm, 1e-6, linear(first, hidden, channels), conv, linear(second, channels, hidden)


def exact(x, height, width, norm, eps, fc1, conv, fc2):
    """In float64, but that what is rounded to float16 on the way is rounded here too, so that rows take the same experts."""
    a = F.layer_norm(x.double(), x.shape[-1:], norm[0].double(), norm[1].double(), eps).half().double()
    h = pick(a, fc1).half().double().transpose(1, 2).unflatten(2, (height, width))
    filters = conv[0].double().t().reshape(-1, 1, 3, 3)
    y = F.gelu(F.conv2d(h, filters, conv[1].double(), padding=1, groups=h.shape[1])).flatten(2).transpose(1, 2).half().double()
    return x.double() + pick(y, fc2)


def pick(a, linear):
    weight, bias, rows = linear
    y = torch.einsum("...k,enk->...en", a, weight.double()) + bias.double()
    return y[..., 0, :] if rows is None else torch.where((a @ rows.double().sum(0) > 0).unsqueeze(-1), y[..., 1, :], y[..., 0, :])


def close(y, expected, routed, limit):
    rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A row whose experts are as good as equal may take the other one.
    assert y.isfinite().all() and (rows > 0.03).double().mean() <= (0.01 if routed else 0)
    assert error(y[rows <= 0.03], expected[rows <= 0.03]) < limit


@pytest.fixture
def strips(monkeypatch):
    """Sets the tallest strip, and whether fc2 runs beside the convolution (2) or before it (1)."""
    from shiftaddvit.ops.conv_mlp import triton

    return lambda tallest, stages=2: monkeypatch.setattr(triton, "mlp_tile", lambda *_: Tile(64, 256, tallest, 8, stages))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second", "channels"), [(1, 1, 32), (2, 2, 32), (2, 1, 32), (1, 2, 32), (1, 1, 64), (2, 2, 64)])
@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_conv_mlp(batch, height, width, first, second, channels, dtype):
    arguments = problem(batch, height, width, first, second, dtype, channels)
    assert fits(arguments[0], width, arguments[5][0], arguments[6][0], arguments[7][0])
    with poisoned_outputs():
        y = conv_mlp(*arguments)
    close(y, exact(*arguments), 2 in (first, second), 4e-3 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize(("batch", "height", "width"), [(3, 56, 56), (5, 13, 9), (3, 28, 28)])
def test_strips_of_every_height_give_the_same_bits(batch, height, width, channels, experts, strips):
    arguments = problem(batch, height, width, experts, experts, torch.bfloat16, channels)
    expected = None
    for tallest in (64, 32, 16, 8, 4, 2):
        for stages in (1, 2):
            strips(tallest, stages)
            with poisoned_outputs():
                y = conv_mlp(*arguments)
            expected = y if expected is None else expected
            assert torch.equal(y, expected), (tallest, stages)


@pytest.mark.parametrize(("side", "channels"), [(56, 32), (28, 64)])
def test_many_runs_are_the_same_run(side, channels):
    arguments = problem(256, side, side, 2, 2, torch.bfloat16, channels)
    expected = conv_mlp(*arguments)
    close(expected[:8], exact(arguments[0][:8], *arguments[1:]), True, 4e-3)
    for _ in range(20):
        assert torch.equal(conv_mlp(*arguments), expected)


@pytest.mark.parametrize("channels", [32, 64])
def test_programmatic_launches_change_nothing(channels):
    x, *rest = problem(4, 56, 56, 2, 2, torch.bfloat16, channels)

    def chain(pdl):
        y = x
        for _ in range(6):
            y = conv_mlp(y, *rest, pdl=pdl)
        return y

    expected = chain(False)
    for _ in range(5):
        assert torch.equal(chain(True), expected)


def test_nan_stays_among_its_neighbours():
    arguments = problem(2, 56, 56, 2, 2, torch.bfloat16)
    arguments[0][0, 57 * 10] = float("nan")
    y = conv_mlp(*arguments).reshape(2, 56, 56, 32)
    assert y[0, 9:12, 9:12].isnan().all() and y.isnan().any(-1).sum() == 9
