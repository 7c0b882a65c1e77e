"""The layers the method is compared with, DeepShift, AdderNet and ShiftAddNet: equal to the published ones; trained, saved and counted in energy."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from baseline_models import close, golden, images, pvt_v1, pvt_v2, vit
from torch import nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import AdderConfig, AdderConv2d, AdderLinear, NormedAdder, ShiftAdder, ShiftConfig, ShiftConv2d, ShiftLayer, pack
from shiftaddvit.layers.window import Window
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.train.optim import clipped_parameters, parameter_groups

torch.set_num_threads(1)


# DeepShift


@pytest.mark.parametrize("variant", ["ps", "q"])
def test_shift_convolution_with_a_window_of_one_equals_the_published_linear_layer(variant):
    data = golden(f"deepshift_{variant}")
    config = ShiftConfig(variant, channel_offset=False, fixed_point=True, published_range=variant == "q")
    layer = ShiftConv2d(Window(24, 10, (1, 1)), True, config)
    parts = {"shift": "shift", "sign": "sign", "bias": "bias"} if variant == "ps" else {"latent": "weight", "bias": "bias"}
    for name, key in parts.items():
        getattr(layer, name).data.copy_(data[key].view_as(getattr(layer, name)))
    x = data["x"].t().reshape(1, 24, 7, 1).requires_grad_()
    y = layer(x)
    close(y[0, :, :, 0].t(), data["y"])
    y.backward(data["grad_y"].t().reshape(1, 10, 7, 1))
    close(x.grad[0, :, :, 0].t(), data["grad_x"])
    for name, key in parts.items():
        close(getattr(layer, name).grad.view_as(data[key]), data[f"grad_{key}"])


CONVOLUTIONS = {
    "strided": nn.Conv2d(6, 10, 3, 2, 1),
    "depthwise": nn.Conv2d(6, 6, 3, 1, 1, groups=6),
    "grouped, wide, dilated, without bias": nn.Conv2d(6, 8, (1, 3), (1, 2), (0, 2), (1, 2), groups=2, bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("variant", ["ps", "q"])
@pytest.mark.parametrize("offset", [False, True])
def test_shift_convolution_rounds_weights_and_packs_exactly(name, variant, offset):
    conv = deepcopy(CONVOLUTIONS[name])
    conv.weight.data[0] *= 40  # above one: only the offset holds it
    layer = ShiftConv2d.from_conv(conv, ShiftConfig(variant, channel_offset=offset))
    exponents = layer.weight[layer.weight != 0].abs().log2()
    assert torch.equal(exponents, exponents.round()) and layer.weight.shape == conv.weight.shape
    assert (layer.weight.abs().max() > 1) == offset
    x = torch.randn(2, 6, 9, 9)
    y = F.conv2d(x, layer.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert torch.equal(layer(x), y)
    assert torch.equal(pack(nn.Sequential(deepcopy(layer)))(x), y)
    layer.enabled = False
    close(layer(x), conv(x))


def test_deepshift_converts_the_whole_network_and_can_keep_the_ends():
    for make in (pvt_v2, pvt_v1, vit):
        model = reparameterize(make(), "deepshift-ps")
        assert not [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
        recipe = replace(recipes["deepshift-q"], keep_ends=True)
        model = reparameterize(make(), recipe)
        dense = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
        assert len(dense) == 2 and dense[0].startswith("patch_embed") and dense[1] == "head"
        assert [name for name, _ in model.shiftaddvit_report.left] == dense


def test_an_override_reaches_the_rest():
    model = reparameterize(pvt_v2(), Recipe(overrides=(("*.dwconv", {"rest": "shift"}),)))
    shifts = [name for name, module in model.named_modules() if isinstance(module, ShiftLayer)]
    assert len(shifts) == 4 and all(name.endswith("dwconv") for name in shifts)
    with pytest.raises(UserError, match="'dwconvs'"):
        reparameterize(pvt_v2(), Recipe(overrides=(("dwconvs", {"rest": "shift"}),)))


def test_convolutions_that_are_not_ordinary_are_kept_and_named():
    model = vit()
    model.patch_embed.proj.padding_mode = "reflect"
    report = reparameterize(model, "deepshift-ps").shiftaddvit_report
    assert type(model.patch_embed.proj) is nn.Conv2d and "patch_embed.proj" in dict(report.left) and "left: 1" in str(report)


# AdderNet and ShiftAddNet


def test_adder_convolution_and_its_gradients_equal_the_published_layer():
    data = golden("adder2d")
    layer = AdderConv2d(Window(3, 5, (3, 3), (int(data["stride"]),) * 2, (int(data["padding"]),) * 2))
    layer.weight.data.copy_(data["weight"])
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(data["grad_y"])
    for ours, key in ((y, "y"), (x.grad, "grad_x"), (layer.weight.grad, "grad_weight")):
        close(ours, data[key])


def test_adder_linear_is_the_convolution_with_a_window_of_one():
    linear, conv = AdderLinear(6, 4), AdderConv2d(Window(6, 4, (1, 1)))
    conv.weight.data.copy_(linear.weight[:, :, None, None])
    x = torch.randn(2, 6, 3, 5)
    close(conv(x).movedim(1, -1), linear(x.movedim(1, -1)))


def test_adders_keep_their_precision_under_autocast():
    layer = NormedAdder.from_dense(nn.Linear(512, 8))
    x = torch.randn(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x)) and layer.adder(x.bfloat16()).dtype == torch.float32
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert deepcopy(layer).half()(x.half()).dtype == torch.float16
    torch.testing.assert_close(half.float(), layer(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_an_adder_behind_a_norm_over_channels_starts_close_to_the_dense_layer_and_batch_norm_does_not():
    """For inputs larger than the weights −Σ|W − x| ≈ W sign(x) − ‖x‖₁."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(500, 64)
    alike = {}
    for norm in ("layer", "batch"):
        y = NormedAdder.from_dense(linear, AdderConfig(norm)).train()(x)
        alike[norm] = F.cosine_similarity((y - y.mean(0)).flatten(), (linear(x) - linear(x).mean(0)).flatten(), dim=0).item()
    assert alike["layer"] > 0.75 and alike["batch"] < 0.5, alike


def test_a_cascade_starts_as_an_increasing_function_of_the_dense_outputs():
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 24), torch.randn(400, 32)
    y, dense = ShiftAdder.from_dense(linear)(x), linear(x)
    assert F.cosine_similarity((y - y.mean(0)).flatten(), (dense - dense.mean(0)).flatten(), dim=0) > 0.7


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_batch_mates_do_not_change_an_image_in_evaluation(norm):
    # In double precision: how float32's convolutions round depends on the processor and the batch, and adders amplify it.
    model, x = reparameterize(pvt_v2(), replace(recipes["addernet"], adder=AdderConfig(norm))).eval().double(), images(3).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-9, atol=1e-9)


def test_addernet_leaves_groups_and_ends_and_says_so():
    model = reparameterize(pvt_v2(), "addernet")
    kept = dict(model.shiftaddvit_report.left)
    assert "groups" in kept["stages.0.blocks.0.mlp.dwconv"] and "keep_ends" in kept["head"] and "keep_ends" in kept["patch_embed.proj"]
    assert isinstance(model.stages[1].downsample.proj, NormedAdder) and isinstance(model.stages[0].blocks[0].attn.sr, NormedAdder)
    cascade = reparameterize(pvt_v2(), "shiftaddnet")
    assert isinstance(cascade.stages[0].blocks[0].mlp.dwconv, ShiftConv2d) and isinstance(cascade.stages[1].downsample.proj, ShiftAdder)
    assert cascade.stages[1].downsample.proj.adder.adder.kernel_size == (1, 1)


@pytest.mark.parametrize("window", [Window(4, 4, (3, 3), groups=4), Window(4, 4, (3, 3), dilation=(2, 2)), Window(4, 4, (3, 3), stride=(1, 2))])
def test_adder_convolutions_refuse_what_they_have_no_form_of(window):
    with pytest.raises(UserError, match="adder convolution"):
        AdderConv2d(window)


def test_adder_weights_do_not_decay_have_a_rate_of_their_own_and_no_part_in_clipping():
    model = reparameterize(pvt_v2(), "shiftaddnet")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 1e-3, 10.0, 3.0)
    adders = {names[id(p)] for p in groups[-1]["params"]}
    assert adders == {name for name in names.values() if name.endswith("adder.weight")} and adders
    assert groups[-1]["weight_decay"] == 0 and groups[-1]["lr"] == pytest.approx(3e-3)
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {names[id(p)] for p in clipped_parameters(model)} == set(names.values()) - adders


@pytest.mark.parametrize("name", ["deepshift-ps", "deepshift-q", "addernet", "shiftaddnet"])
def test_the_first_stage_has_every_layer_dense_again(name):
    """Of a recipe whose attention changes too; convolutions included."""
    from shiftaddvit.reparam.stages import to_attention_stage, to_linear_stage

    recipe = replace(recipes[name], attention="linear")
    model = reparameterize(pvt_v2(), recipe)
    keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    to_attention_stage(model)
    reference = reparameterize(pvt_v2(), Recipe(attention="linear"))
    assert model.state_dict().keys() == reference.state_dict().keys()
    with torch.no_grad():
        close(model.eval()(images()), reference.eval()(images()))
    assert {key: tuple(value.shape) for key, value in to_linear_stage(model).state_dict().items()} == keys


def test_two_stages_of_training_with_adders_end_in_the_file_they_saved(tmp_path):
    from shiftaddvit.train import FinetuneConfig, StageConfig, finetune

    model = reparameterize(vit(), replace(recipes["shiftaddnet"], attention="linear"))
    loader = [(images(), torch.tensor([0, 1, 4]))] * 2
    config = FinetuneConfig(stages=(StageConfig("attention", 1), StageConfig("all", 1)), evaluate_every=0)
    finetune(model, loader, None, config, output=tmp_path / "run", show=False)
    with torch.no_grad():
        again = shiftaddvit.load(tmp_path / "run" / "model.safetensors")(images())
        assert torch.equal(again, model.eval()(images())) and again.isfinite().all()


# Energy


@pytest.mark.parametrize("mode", ["paper", "eyeriss"])
def test_adders_cost_less_than_multiplications_and_shift_adders_both(mode):
    found = {recipe: shiftaddvit.energy(pvt_v2() if recipe == "dense" else reparameterize(pvt_v2(), recipe), image_size=128, mode=mode)
             for recipe in ("dense", "addernet", "shiftaddnet", "deepshift-ps", "adder-attention", "performer")}  # fmt: skip
    kinds = {recipe: set(energy.by_kind()) for recipe, energy in found.items()}
    assert {"linear (adder)", "conv (adder)"} <= kinds["addernet"] and {"linear (shift)", "linear (adder)", "conv (shift)"} <= kinds["shiftaddnet"]
    assert "product (adder)" in kinds["adder-attention"]
    assert not {"linear (mult)", "conv (mult)"} & kinds["deepshift-ps"]
    arithmetic = {
        recipe: sum(pj for layer in energy.per_layer if layer.primitive != "stream" for (level, _), pj in layer.cells.items() if level == "compute")
        for recipe, energy in found.items()
    }
    assert arithmetic["deepshift-ps"] < arithmetic["addernet"] < arithmetic["dense"]
    if mode == "eyeriss":
        assert not any(energy.uncosted for energy in found.values())
        norms = {recipe: sum(layer.kind == "norm" for layer in energy.per_layer) for recipe, energy in found.items()}
        assert norms["addernet"] > norms["dense"]  # each adder's norm is counted
