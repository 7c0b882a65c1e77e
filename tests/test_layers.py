"""Every kind of layer: pickles, copies, compiles, keeps its precision under autocast, and an image does not depend on its batch."""

import pickle
from copy import deepcopy

import pytest
import torch
from attention_layers import ADDS, attention
from torch import nn

import shiftaddvit
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.layers import BinaryConfig, MoEConfig, MoELinear, ShiftLinear

torch.set_num_threads(1)


@pytest.mark.parametrize("layer", [attention(BinaryConfig()), attention(ADDS["ksh"]), MoELinear.from_linear(nn.Linear(16, 16))])
def test_layers_pickle_and_copy(layer):
    layer = layer.eval()
    x = torch.randn(2, 9, 16)
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copy(x), layer(x))


@pytest.mark.parametrize("name", ["quant", "moe"])
def test_layers_compile_in_one_graph_with_equal_values_and_gradients(name):
    torch.compiler.reset()
    layer = attention(BinaryConfig()) if name == "quant" else MoELinear.from_linear(nn.Linear(16, 6), MoEConfig(noise=False))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual.square().sum(), list(layer.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ADDS, "ecoformer", "moe", "shift"])
def test_autocast_is_finite_and_near_full_precision(name):
    torch.manual_seed(0)
    if name == "moe":
        layer: nn.Module = MoELinear.from_linear(nn.Linear(16, 16))
    elif name == "shift":
        layer = ShiftLinear(16, 16)
    elif name == "ecoformer":
        layer = attention(ADDS["ksh"], cls=EcoformerAttention)
    else:
        layer = attention(ADDS[name])
    layer.eval()
    x = torch.randn(2, 9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and x.grad.isfinite().all()
    if name in ("float", "moe", "shift"):  # codes may flip
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("recipe", ["ours-quant-moe", "ours-quant-shift", "ours-ksh-moe", "ecoformer", "ours-quant-linear", "msa"])
def test_logits_of_an_image_do_not_depend_on_its_batch(recipe):
    torch.manual_seed(1)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = shiftaddvit.reparameterize(shiftaddvit.create_model("vit_tiny_patch16_224", args), recipe)
    images = torch.randn(4, 3, 32, 32)
    images[0] *= 20
    shiftaddvit.calibrate(model, images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images[2:3]), model(images)[2:3], rtol=1e-4, atol=1e-5)
