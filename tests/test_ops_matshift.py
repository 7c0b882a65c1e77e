"""MatShift: every backend gives the product of exact powers of two, on awkward shapes and values."""

import pytest
import torch
from ops_checks import SIZES, error, poisoned_outputs, random_codes

from shiftaddvit.errors import UserError
from shiftaddvit.ops.matshift import formats, matshift, matshift_int8, reference

BACKENDS = ("reference", "cpu", "triton")
TOLERANCE = {torch.float16: 8e-4, torch.float32: 3e-7}


def problem(tokens, inputs, outputs, bits=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(outputs, inputs, bits, seed)
    offset = torch.randint(-3, 3, (outputs, 1), generator=generator)
    x = torch.randn(tokens, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    exact = x.double() @ formats.decode(codes, bits, offset).double().t() + bias.double()
    return x, codes, offset, bias, exact


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", SIZES)
def test_expanded_weights_give_the_exact_product(tokens, dtype, backend):
    x, codes, offset, bias, _ = problem(tokens, 40, 24)
    x = x.to(dtype)
    weight = formats.decode(codes, 5, dtype=dtype)
    scale = formats.channel_scale(offset, 24)
    expected = (x.double() @ weight.double().t()) * scale + bias
    with poisoned_outputs():
        y = matshift(x, weight, bias, scale, backend=backend)
    assert y.dtype == dtype and error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("inputs", [13, 64, 97])
def test_packed_weights_give_the_same_product(inputs, bits, backend):
    x, codes, offset, bias, exact = problem(33, inputs, 20, bits)
    with poisoned_outputs():
        y = matshift(x, formats.pack(codes, bits), bias, formats.channel_scale(offset, 20), bits, backend=backend)
    assert error(y, exact) < 1e-6


@pytest.mark.parametrize("bits", [4, 5])
def test_packed_and_expanded_agree_bit_for_bit_in_the_kernel(bits):
    x, codes, offset, bias, _ = problem(17, 48, 32, bits)
    x, scale = x.half(), formats.channel_scale(offset, 32)
    packed = matshift(x, formats.pack(codes, bits), bias, scale, bits, backend="triton")
    expanded = matshift(x, formats.decode(codes, bits, dtype=torch.float16), bias, scale, backend="triton")
    assert torch.equal(packed, expanded)


def test_float32_rows_of_any_magnitude_keep_float32_precision():
    x, codes, *_ = problem(40, 64, 32)
    x = x * torch.logspace(-30, 30, 40).unsqueeze(1)
    weight = formats.decode(codes, 5)
    y = matshift(x, weight, backend="triton")
    rows = (y.double() - x.double() @ weight.double().t()).norm(dim=1) / (x.double() @ weight.double().t()).norm(dim=1)
    assert rows.max() < 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_epilogue(backend):
    x, codes, _, bias, _ = problem(30, 32, 16)
    weight = formats.decode(codes, 5)
    expected = torch.nn.functional.gelu(x.double() @ weight.double().t() + bias)
    assert error(matshift(x, weight, bias, activation="gelu", backend=backend), expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_exact_and_the_same_on_every_backend(backend):
    codes = random_codes(24, 50, 4)
    weight, w_scale = formats.decode_int8(codes)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (5, 7, 50), dtype=torch.int8, generator=generator)
    exact = (x.long() @ weight.long().t()).float() * w_scale
    with poisoned_outputs():
        y = matshift_int8(x, torch.ones(1), weight, w_scale, backend=backend)
    assert torch.equal(y, exact)


def test_integers_equal_literal_shifts_and_adds():
    codes = random_codes(6, 9, 4)
    x = torch.randint(-127, 128, (4, 9), dtype=torch.int8)
    weight, _ = formats.decode_int8(codes)
    y = matshift_int8(x, torch.ones(1), weight, torch.ones(6), backend="triton")
    assert torch.equal(y.long(), reference.shift_literally(x, codes, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_requantised_output_is_rounded_and_saturated(backend):
    codes = random_codes(16, 32, 4)
    weight, w_scale = formats.decode_int8(codes)
    x = torch.randint(-127, 128, (21, 32), dtype=torch.int8)
    x_scale = torch.rand(21) / 50
    bias = torch.randn(16)
    y = matshift_int8(x, x_scale, weight, w_scale, bias, torch.tensor([0.02]), "gelu", backend=backend)
    real = torch.nn.functional.gelu((x.double() @ weight.double().t()) * x_scale[:, None] * w_scale + bias) / 0.02
    assert y.dtype == torch.int8 and y.max() == 127
    assert (y.double() - real.clamp(-127, 127)).abs().max() < 0.5001


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_empty_inputs(backend):
    x, codes, _, bias, _ = problem(12, 32, 16)
    weight = formats.decode(codes, 5)
    turned = x.t().contiguous().t()
    assert error(matshift(turned, weight, bias, backend=backend), x.double() @ weight.double().t() + bias) < 1e-6
    assert error(matshift(x[::3], weight, backend=backend), x[::3].double() @ weight.double().t()) < 1e-6
    assert matshift(x[:0].reshape(2, 0, 32), weight, bias, backend=backend).shape == (2, 0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_infinity_and_nan_stay_in_their_rows(backend, dtype):
    x = torch.ones(6, 32, dtype=dtype)
    x[1, 3], x[2, 4], x[4] = float("inf"), float("nan"), 0
    weight = torch.full((8, 32), 0.5, dtype=dtype)
    y = matshift(x, weight, backend=backend)
    assert torch.isinf(y[1]).all() and torch.isnan(y[2]).all() and (y[4] == 0).all()
    assert torch.equal(y[[0, 3, 5]], torch.full((3, 8), 16.0, dtype=dtype))


def test_gradients_match_the_reference_product():
    x, codes, offset, bias, _ = problem(9, 16, 8)
    weight, scale = formats.decode(codes, 5), formats.channel_scale(offset, 8)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    twins = [t.detach().double().requires_grad_() for t in inputs]
    y = matshift(inputs[0], inputs[1], inputs[2], scale, activation="gelu", backend="triton")
    expected = torch.nn.functional.gelu((twins[0] @ twins[1].t()) * scale + twins[2])
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    for name, ours, theirs in zip(("x", "weight", "bias"), inputs, twins, strict=True):
        assert error(ours.grad, theirs.grad) < 1e-5, name


@pytest.mark.parametrize("bits", [0, 5])
def test_opcheck(bits):
    x, codes, offset, bias, _ = problem(5, 16, 8)
    weight = formats.pack(codes, 5) if bits else formats.decode(codes, 5).requires_grad_()
    arguments = (x.requires_grad_(), weight, formats.channel_scale(offset, 8), bias.requires_grad_(), bits, "gelu", "cpu")
    torch.library.opcheck(torch.ops.shiftaddvit.matshift.default, arguments)
    values, w_scale = formats.decode_int8(random_codes(8, 16, 4))
    integers = torch.randint(-9, 9, (5, 16), dtype=torch.int8)
    torch.library.opcheck(
        torch.ops.shiftaddvit.matshift_int8.default,
        (integers, torch.ones(1), values, w_scale, None, torch.ones(1), "none", torch.float32, "cpu"),
    )


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, codes, offset, bias, _ = problem(1, 16, 8)
        self.register_buffer("codes", formats.pack(codes, 5))
        self.register_buffer("scale", formats.channel_scale(offset, 8))
        self.bias = torch.nn.Parameter(bias)

    def forward(self, x):
        return matshift(x, self.codes, self.bias, self.scale, 5, "gelu") + 1


def test_compiles_without_graph_breaks_and_exports():
    layer, x = Layer(), torch.randn(2, 3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_mistakes_are_named():
    x, weight = torch.randn(3, 16), torch.ones(8, 16)
    with pytest.raises(UserError, match="its inputs must be 16"):
        matshift(x, weight[:, :9])
    with pytest.raises(UserError, match=r"packed weight must be uint8 \(out, 10\)"):
        matshift(x, weight, bits=5)
    with pytest.raises(UserError, match="activation 'relu'"):
        matshift(x, weight, activation="relu")
    with pytest.raises(UserError, match=r"bias must be \(8,\)"):
        matshift(x, weight, torch.ones(7))
    with pytest.raises(UserError, match="backend 'cuda'"):
        matshift(x, weight, backend="cuda")
