"""The fused MLP kernels equal the layers they fuse: in float64, on odd shapes, with one expert and with two."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.fused_mlp import conv_linear, norm_linear

BACKENDS = ("reference", "triton")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def exact_experts(a, weight, bias, router):
    y = torch.einsum("...k,enk->...en", a, weight.double()) + bias.double()
    if router is None:
        return y[..., 0, :], None
    choice = (a @ router.double().t()).argmax(-1)
    return torch.where(choice.bool().unsqueeze(-1), y[..., 1, :], y[..., 0, :]), choice


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 32, 16), (49, 40, 70), (63, 320, 24), (100, 24, 33)])
def test_norm_linear_is_layer_norm_then_the_chosen_expert(tokens, inputs, outputs, experts, backend):
    x = random(tokens, inputs) * 3 + 5
    norm = random(inputs, seed=1) + 1, random(inputs, seed=2)
    weight, bias = random(experts, outputs, inputs, scale=inputs**-0.5), random(experts, outputs)
    router = random(2, inputs) if experts == 2 else None
    residual = random(tokens, outputs, seed=5)
    a = F.layer_norm(x.double(), (inputs,), norm[0].double(), norm[1].double(), 1e-6)
    y, choice = exact_experts(a, weight, bias, router)
    expected = F.gelu(y) + residual
    with poisoned_outputs():
        y, chosen = norm_linear(x, weight, bias, norm, 1e-6, router, residual, activation="gelu", backend=backend)
    assert error(y, expected) < 2e-6
    if experts == 2:
        assert torch.equal(chosen.long(), choice)


@pytest.mark.parametrize("inputs", [32, 272])
def test_norm_linear_in_float16_and_without_norm(inputs):
    x, weight = random(3, 11, inputs).half(), random(8, inputs, scale=inputs**-0.5).half()
    y, choice = norm_linear(x, weight, backend="triton")
    assert choice.numel() == 0 and y.dtype == torch.float16
    assert error(y, x.double() @ weight.double().t()) < 6e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_linear_rounds_to_int8(backend):
    x, weight = random(20, 32), random(16, 32)
    y, _ = norm_linear(x, weight, out_scale=torch.tensor([0.1]), backend=backend)
    real = (x.double() @ weight.double().t() / 0.1).clamp(-127, 127)
    assert y.dtype == torch.int8 and (y.double() - real).abs().max() < 0.501


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("batch", "height", "width", "hidden", "outputs"), [(1, 1, 1, 16, 16), (2, 7, 7, 40, 20), (3, 3, 5, 96, 33)])
def test_conv_linear_is_depthwise_gelu_linear_residual(batch, height, width, hidden, outputs, experts, backend):
    tokens = height * width
    h, conv = random(batch, tokens, hidden), torch.nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
    weight, bias = random(experts, outputs, hidden, scale=hidden**-0.5), random(experts, outputs)
    router = random(2, hidden) if experts == 2 else None
    residual = random(batch, tokens, outputs, seed=3)
    pictures = h.double().transpose(1, 2).reshape(batch, hidden, height, width)
    a = F.gelu(conv.double()(pictures)).flatten(2).transpose(1, 2)
    y, choice = exact_experts(a, weight, bias, router)
    conv.float()
    with torch.no_grad(), poisoned_outputs():
        ours, chosen = conv_linear(
            h, height, width, conv.weight.reshape(hidden, 9).t(), conv.bias, weight, bias, router, residual, backend=backend
        )
    assert error(ours, y + residual) < 2e-6
    if experts == 2:
        assert torch.equal(chosen.long(), choice)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_linear_with_int8_input_and_closing_norm(backend):
    h = torch.randint(-127, 128, (2, 12, 32), dtype=torch.int8)
    scale, conv, shift = torch.rand(32) / 50, random(9, 32), random(32)
    weight, residual = random(24, 32), random(2, 12, 24)
    norm = random(24) + 1, random(24, seed=1)
    ours, _ = conv_linear(h, 3, 4, conv, shift, weight, None, None, residual, scale, norm, 1e-5, backend=backend)
    real = (h.double() * scale).transpose(1, 2).reshape(2, 32, 3, 4)
    a = F.gelu(F.conv2d(real, conv.double().t().reshape(32, 1, 3, 3), shift.double(), padding=1, groups=32))
    y = a.flatten(2).transpose(1, 2) @ weight.double().t() + residual
    assert error(ours, F.layer_norm(y, (24,), norm[0].double(), norm[1].double(), 1e-5)) < 2e-6


@pytest.mark.parametrize("favourite", [0, 1])
def test_all_tokens_to_one_expert(favourite):
    x, weight = random(10, 16).abs(), random(2, 8, 16)
    router = torch.zeros(2, 16)
    router[favourite] = 1
    y, choice = norm_linear(x, weight, router=router, backend="triton")
    assert (choice == favourite).all() and error(y, x.double() @ weight[favourite].double().t()) < 1e-6


def test_ties_go_to_the_first_expert():
    x, weight = random(10, 16), random(2, 8, 16)
    _, choice = norm_linear(x, weight, router=torch.zeros(2, 16), backend="triton")
    assert (choice == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_near_its_token(backend):
    h = torch.zeros(1, 25, 16)
    h[0, 0] = float("nan")
    y, _ = conv_linear(h, 5, 5, torch.ones(9, 16), torch.zeros(16), torch.ones(4, 16), backend=backend)
    broken = torch.isnan(y).all(-1).reshape(5, 5)
    assert broken[:2, :2].all() and broken.sum() == 4
    x = torch.ones(4, 16)
    x[2, 3] = float("inf")
    y, _ = norm_linear(x, torch.ones(4, 16), norm=(torch.ones(16), torch.zeros(16)), backend=backend)
    assert torch.isnan(y[2]).all() and torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_non_contiguous(backend):
    weight = random(8, 16)
    assert norm_linear(random(2, 0, 16), weight, backend=backend)[0].shape == (2, 0, 8)
    assert conv_linear(random(0, 4, 16), 2, 2, random(9, 16), random(16), weight, backend=backend)[0].shape == (0, 4, 8)
    x = random(16, 6).t()
    assert error(norm_linear(x, weight, backend=backend)[0], x.double() @ weight.double().t()) < 1e-6


def test_opcheck():
    args = (random(6, 16), torch.ones(16), torch.zeros(16), 1e-6, random(2, 8, 16), random(2, 8), random(2, 16), None, None, "gelu")
    torch.library.opcheck(torch.ops.shiftaddvit.norm_linear.default, (*args, False, "reference"))
    args = (random(6, 16), 2, 3, random(9, 16), random(16), random(1, 8, 16), None, None, random(6, 8), None, None, None, 1e-6, False)
    torch.library.opcheck(torch.ops.shiftaddvit.conv_linear.default, (*args, False, "reference"))


def test_compiles_without_graph_breaks_and_exports():
    class Mlp(torch.nn.Module):
        def forward(self, x):
            h, _ = norm_linear(x, random(32, 16), norm=(torch.ones(16), torch.zeros(16)))
            return conv_linear(h, 2, 3, random(9, 32), random(32), random(16, 32), residual=x)[0]

    x = random(2, 6, 16)
    expected = Mlp()(x)
    assert torch.equal(torch.export.export(Mlp(), (x,)).module()(x), expected)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="two experts need a router of"):
        norm_linear(random(3, 16), random(2, 8, 16))
    with pytest.raises(UserError, match=r"h must be \(B, 2·3, hidden\)"):
        conv_linear(random(1, 5, 16), 2, 3, random(9, 16), random(16), random(8, 16))
    with pytest.raises(UserError, match="h_scale goes with int8"):
        conv_linear(random(1, 6, 16).to(torch.int8), 2, 3, random(9, 16), random(16), random(8, 16))
