"""LayerNorm + linear equals the layers it fuses: in float64, on odd shapes, with one expert and with two."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.backends import overlapping
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.norm_linear import norm_linear, route_rows

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


@pytest.mark.parametrize("inputs", [32, 320])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_the_residual_or_of_the_weights(inputs, backend):
    x = random(20, inputs).bfloat16()
    weight, router = random(2, 16, inputs, scale=inputs**-0.5).half(), random(2, inputs)
    residual = random(20, 16).bfloat16()
    a = x.double().half().double()
    expected, choice = exact_experts(a, weight, torch.zeros(2, 16), router)
    y, chosen = norm_linear(x, weight, router=router, backend=backend)
    assert y.dtype == torch.float16 and error(y, expected) < 1e-3 and torch.equal(chosen.long(), choice)
    y, _ = norm_linear(x, weight, router=router, residual=residual, backend=backend)
    assert y.dtype == torch.bfloat16 and error(y, expected + residual.double()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_route_rows_keep_float32s_precision(dtype):
    router = random(2, 48) * torch.logspace(-3, 3, 48)
    rows = route_rows(router, dtype)
    assert rows.shape == (16, 48) and rows.dtype == dtype and not rows[3:].any()
    exact = router[1] - router[0]
    assert ((rows.double().sum(0) - exact).abs() <= 2**-22 * exact.abs() + 2**-24).all()
    x, weight = random(9, 48), random(2, 4, 48)
    ours, theirs = (norm_linear(x.to(dtype), weight.to(dtype), router=r, backend="reference") for r in (rows, router))
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0], theirs[0])


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
    x = torch.ones(4, 16)
    x[2, 3] = float("inf")
    y, _ = norm_linear(x, torch.ones(4, 16), norm=(torch.ones(16), torch.zeros(16)), backend=backend)
    assert torch.isnan(y[2]).all() and torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_non_contiguous(backend):
    weight = random(8, 16)
    assert norm_linear(random(2, 0, 16), weight, backend=backend)[0].shape == (2, 0, 8)
    x = random(16, 6).t()
    assert error(norm_linear(x, weight, backend=backend)[0], x.double() @ weight.double().t()) < 1e-6


def test_opcheck():
    args = (random(6, 16), torch.ones(16), torch.zeros(16), 1e-6, random(2, 8, 16), random(2, 8), random(16, 16), None, None, "gelu")
    torch.library.opcheck(torch.ops.shiftaddvit.norm_linear.default, (*args, False, "reference"))


def test_compiles_without_graph_breaks_and_exports():
    class Mlp(torch.nn.Module):
        def forward(self, x):
            h, _ = norm_linear(x, random(32, 16), norm=(torch.ones(16), torch.zeros(16)))
            return norm_linear(conv_gelu(h, 2, 3, random(9, 32), random(32)), random(16, 32), residual=x)[0]

    x = random(2, 6, 16)
    expected = Mlp()(x)
    assert torch.equal(torch.export.export(Mlp(), (x,)).module()(x), expected)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="two experts need a router of"):
        norm_linear(random(3, 16), random(2, 8, 16))
    with pytest.raises(UserError, match="float32, or both float16 or bfloat16"):
        norm_linear(random(3, 16), random(8, 16).half())


def test_launches_overlap_only_where_every_weight_is_there_already():
    weight = random(8, 16)
    assert overlapping(True, weight, None) and not overlapping(False, weight)
    assert not overlapping(True, weight, random(16, 8).t())


@pytest.mark.parametrize("prepared", [True, False])
def test_a_router_prepared_by_the_call_is_waited_for(prepared, monkeypatch):
    from shiftaddvit.ops.norm_linear import triton as kernels

    launched = []
    monkeypatch.setattr(kernels, "norm_linear_kernel", type("Kernel", (), {"__getitem__": lambda self, grid: lambda *args, **flags: launched.append(flags)})())
    router = route_rows(random(2, 16), torch.float32) if prepared else random(2, 16)
    kernels.norm_linear(random(5, 16), None, None, 0.0, random(2, 8, 16), None, router, None, None, "none", pdl=True)
    assert launched[0]["PDL"] == prepared and ("launch_pdl" in launched[0]) == prepared
