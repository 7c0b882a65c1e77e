"""PVTv2's whole MLP in one op: the reference is the composition of its parts in float64, and the kernel's own Python, run with torch in place
of Gluon, is the reference on pictures of every width, however they are cut into strips."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, pick, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.conv_mlp import conv_mlp, fits
from shiftaddvit.ops.conv_mlp.gluon import has_gluon
from shiftaddvit.ops.norm_linear import norm_linear, route_rows
from shiftaddvit.ops.tiling import Tile

needs_gluon = pytest.mark.skipif(not has_gluon(), reason="needs a Triton that has Gluon")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def problem(batch, height, width, first, second, channels=32, hidden=256, dtype=torch.float32):
    """Arguments of `conv_mlp`."""
    x = random(batch, height * width, channels)
    fc1 = random(first, hidden, channels) * channels**-0.5, random(first, hidden), random(2, channels) if first == 2 else None
    fc2 = random(second, channels, hidden) * hidden**-0.5, random(second, channels), random(2, hidden) if second == 2 else None
    fc1, fc2 = ((weight.to(dtype), bias, router) for weight, bias, router in (fc1, fc2))
    conv = (random(9, hidden) * 0.3).to(dtype), random(hidden)
    return x, height, width, (random(channels) + 1, random(channels, seed=1)), 1e-6, fc1, conv, fc2


def exact(x, height, width, norm, eps, fc1, conv, fc2):
    a = F.layer_norm(x.double(), x.shape[-1:], norm[0].double(), norm[1].double(), eps)
    h = pick(a, fc1).transpose(1, 2).unflatten(2, (height, width))
    filters = conv[0].double().t().reshape(-1, 1, 3, 3)
    y = F.gelu(F.conv2d(h, filters, conv[1].double(), padding=1, groups=h.shape[1])).flatten(2).transpose(1, 2)
    return x.double() + pick(y, fc2)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 7, 7), (1, 5, 9), (1, 1, 1)])
def test_it_is_the_composition(batch, height, width, first, second):
    arguments = problem(batch, height, width, first, second, channels=16, hidden=48)
    assert error(conv_mlp(*arguments), exact(*arguments)) < 1e-5


def apart(x, height, width, norm, eps, fc1, conv, fc2):
    """The three ops."""
    h, _ = norm_linear(x, fc1[0], fc1[1], norm, eps, fc1[2])
    return norm_linear(conv_gelu(h, height, width, *conv), *fc2[:2], router=fc2[2], residual=x)[0]


def test_routers_as_rows_are_the_same():
    x, height, width, norm, eps, fc1, conv, fc2 = problem(2, 5, 6, 2, 2)
    rows = [(weight, bias, route_rows(router, torch.float32)) for weight, bias, router in (fc1, fc2)]
    assert error(conv_mlp(x, height, width, norm, eps, rows[0], conv, rows[1]), conv_mlp(x, height, width, norm, eps, fc1, conv, fc2)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_where_the_three_ops_round_them(dtype):
    x, *rest = problem(2, 7, 7, 2, 2, dtype=torch.float16)
    x = x.to(dtype)
    y = conv_mlp(x, *rest)
    assert y.dtype == dtype and torch.equal(y, apart(x, *rest))


@pytest.fixture
def emulated(monkeypatch):
    """Makes the op's launch run the kernel's Python on the CPU, with strips of at most so many rows."""
    from gluon_emulation import Emulated

    from shiftaddvit.ops.conv_mlp import hidden, kernels, pieces, triton

    monkeypatch.setattr(triton, "conv_mlp_kernel", Emulated(kernels.conv_mlp_kernel, pieces, kernels))
    monkeypatch.setattr(triton, "conv_hidden_kernel", Emulated(hidden.conv_hidden_kernel, pieces, kernels, hidden))

    def run(arguments, tallest=64, late=2):
        x, height, width, norm, eps, fc1, conv, fc2 = arguments
        monkeypatch.setattr(triton, "mlp_tile", lambda *_: Tile(64, 256, tallest, 8, late))
        fc1, fc2 = (
            (weight, bias, route_rows(router, torch.float16) if router is not None else None) for weight, bias, router in (fc1, fc2)
        )
        with poisoned_outputs():
            return triton.conv_mlp(x, height, width, eps, *norm, *fc1, *conv, *fc2)

    return run


@needs_gluon
@pytest.mark.parametrize(
    ("batch", "height", "width", "first", "second", "tallest"),
    [
        (1, 7, 7, 1, 1, 64), (3, 7, 7, 2, 2, 2), (3, 14, 14, 2, 1, 8), (1, 28, 28, 1, 2, 16), (2, 9, 56, 2, 2, 64), (1, 13, 9, 1, 1, 4),
        (2, 3, 64, 2, 2, 2), (1, 2, 61, 1, 1, 64), (9, 1, 1, 2, 2, 64), (5, 5, 8, 1, 2, 2), (3, 4, 16, 2, 2, 4), (2, 6, 33, 1, 1, 2),
    ],
)  # fmt: skip
def test_the_kernel_without_gluon_is_the_reference(emulated, batch, height, width, first, second, tallest):
    arguments = problem(batch, height, width, first, second, dtype=torch.float16)
    x, *rest = arguments
    y, expected = emulated(arguments, tallest), exact(x.double(), *rest)
    # A row whose experts are as good as equal may go to the other one behind rounding.
    rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert y.isfinite().all() and (rows > 0.02).float().mean() <= (0.02 if 2 in (first, second) else 0)
    assert error(y[rows <= 0.02], expected[rows <= 0.02]) < 3e-3


@needs_gluon
@pytest.mark.parametrize(
    ("batch", "height", "width", "first", "tallest"),
    [(3, 7, 7, 1, 64), (2, 14, 14, 2, 4), (2, 5, 28, 2, 2), (1, 4, 56, 1, 64), (1, 13, 9, 2, 8), (1, 2, 64, 1, 2), (5, 3, 8, 2, 64)],
)  # fmt: skip
def test_the_kernel_of_64_channels_without_gluon_is_the_reference(emulated, batch, height, width, first, tallest):
    arguments = problem(batch, height, width, first, 1, channels=64, hidden=512, dtype=torch.float16)
    x, *rest = arguments
    y, expected = emulated(arguments, tallest), exact(x.double(), *rest)
    rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert y.isfinite().all() and (rows > 0.02).float().mean() <= (0.02 if first == 2 else 0)
    assert error(y[rows <= 0.02], expected[rows <= 0.02]) < 3e-3


@needs_gluon
def test_strips_of_every_height_give_the_same_bits(emulated):
    arguments = problem(3, 11, 14, 2, 2, dtype=torch.float16)
    expected = emulated(arguments, 64)
    for tallest, late in ((2, 2), (4, 1), (8, 2), (16, 1)):
        assert torch.equal(emulated(arguments, tallest, late), expected), tallest


@needs_gluon
def test_nan_stays_among_its_neighbours(emulated):
    arguments = problem(2, 6, 7, 2, 2, dtype=torch.float16)
    arguments[0][0, 0, 3], arguments[0][1, 41, 0] = float("nan"), float("inf")
    y = emulated(arguments, 2).reshape(2, 6, 7, 32)
    assert y[0, :2, :2].isnan().all() and y[0, 2:].isfinite().all() and y[0, :, 2:].isfinite().all()
    assert y[1, 4:, 5:].isnan().all() and y[1, :4].isfinite().all() and y[1, :, :5].isfinite().all()


def test_opcheck_and_compile():
    x, height, width, norm, eps, fc1, conv, fc2 = problem(2, 2, 3, 2, 1)
    torch.library.opcheck(torch.ops.shiftaddvit.conv_mlp.default, (x, height, width, eps, *norm, *fc1, *conv, *fc2, False, "reference"))
    compiled = torch.compile(lambda x: conv_mlp(x, height, width, norm, eps, fc1, conv, fc2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv_mlp(x, height, width, norm, eps, fc1, conv, fc2))
    assert conv_mlp(x[:0], height, width, norm, eps, fc1, conv, fc2).shape == (0, 6, 32)


def test_mistakes_say_what_is_wrong():
    x, height, width, norm, eps, fc1, conv, fc2 = problem(1, 2, 3, 1, 2)
    with pytest.raises(UserError, match=r"x must be \(B, 3·3, C\)"):
        conv_mlp(x, 3, 3, norm, eps, fc1, conv, fc2)
    with pytest.raises(UserError, match=r"fc1 must have a weight \(1 or 2 experts, 256, 32\)"):
        conv_mlp(x, 2, 3, norm, eps, fc2, conv, fc2)
    with pytest.raises(UserError, match="fc2 needs a router"):
        conv_mlp(x, 2, 3, norm, eps, fc1, conv, (*fc2[:2], None))
    with pytest.raises(UserError, match=r"conv must be \(9, 256\)"):
        conv_mlp(x, 2, 3, norm, eps, fc1, (conv[0][:8], conv[1]), fc2)
    with pytest.raises(UserError, match=r"norm bias must be \(32,\)"):
        conv_mlp(x, 2, 3, (norm[0], norm[1][:8]), eps, fc1, conv, fc2)
    assert not fits(x, width, fc1[0], conv[0], fc2[0])
    with pytest.raises(UserError, match="backend 'triton' cannot run"):
        conv_mlp(x, 2, 3, norm, eps, fc1, conv, fc2, backend="triton")
