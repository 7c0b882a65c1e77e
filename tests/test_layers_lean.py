"""Training in little memory: the same gradients from fewer kept tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shiftaddvit
from shiftaddvit.layers import MoEConfig, MoELinear, record_routing
from shiftaddvit.layers.lean import as_computed, attach_gate, wide_linear
from shiftaddvit.losses import balance_loss
from shiftaddvit.reparam import reparameterize
from shiftaddvit.train.latency import expert_costs


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output), retain_graph=True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
def test_wide_linear_is_the_float32_product(shape):
    x, weight = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(4, 8, requires_grad=True)
    found, expected = wide_linear(x, weight), F.linear(x.float(), weight)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for a, b in zip(gradients(found, (x, weight)), gradients(expected, (x, weight)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_gate_has_the_gradients_of_a_product(dtype):
    y, p = torch.randn(2, 3, 8).to(dtype).requires_grad_(), torch.rand(2, 3, requires_grad=True)
    gate = p / p.detach()
    found, expected = attach_gate(y, gate), y * gate.unsqueeze(-1).to(dtype)
    assert torch.equal(found, y)
    for a, b in zip(gradients(found, (y, p)), gradients(expected, (y, p)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_rows_are_cast_once_under_autocast_and_else_never():
    x = torch.randn(3, 4)
    assert as_computed(x) is x and as_computed(x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_computed(x).dtype == torch.bfloat16 and as_computed(x.double()).dtype == torch.float64


def test_under_autocast_router_and_experts_see_the_same_rows():
    torch.manual_seed(0)
    layer = MoELinear.from_linear(nn.Linear(16, 8), MoEConfig(noise=False))
    x = torch.randn(200, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(layer) as records:
        layer(x)
    (routing,) = records.values()
    expected = F.linear(x.bfloat16().float(), layer.router.weight)
    assert torch.equal(routing.clean_logits, expected) and not torch.equal(expected, F.linear(x, layer.router.weight))


def kept_bytes_an_image(recipe):
    """What backward needs for one more image, of a PVTv2-B0 at 64×64 in bfloat16."""
    torch.manual_seed(0)
    model = shiftaddvit.create_model("pvt_v2_b0", {"num_classes": 10})
    if recipe:
        reparameterize(model, recipe)
    model.train()

    def kept(images):
        sizes, alive = {}, []

        def keep(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        with record_routing(model) as records, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(torch.randn(images, 3, 64, 64))
            logits.float().sum() + balance_loss(records, expert_costs(model))
        return sum(sizes.values())

    return (kept(6) - kept(3)) / 3


def test_mixtures_keep_little_more_than_the_dense_model():
    dense = kept_bytes_an_image(None)
    assert kept_bytes_an_image("ours-quant-add") < 1.15 * dense
    assert kept_bytes_an_image("ours-quant-moe") < 1.35 * dense  # the project's bar for all of training's memory is 1.5
