"""The systems the method is compared with: their layers equal the published ones or their formulas, and stay finite where those do not."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shiftaddvit
from shiftaddvit.baselines import adder_attention, performer
from shiftaddvit.baselines.adder_attention import AdderAttention, AdderAttentionConfig
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.baselines.performer import PerformerAttention, PerformerConfig, orthogonal_features
from shiftaddvit.errors import UserError
from shiftaddvit.layers import (
    AdderConfig, AdderConv2d, AdderLinear, HashConfig, NormedAdder, ShiftAdder, ShiftConfig, ShiftConv2d, ShiftLayer, pack,
)  # fmt: skip
from shiftaddvit.layers.window import Window
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.train.optim import clipped_parameters, parameter_groups

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2), "num_classes": 5}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5)


def pvt_v2(name: str = "pvt_v2_b0", **more) -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model(name, {**PYRAMID, "depths": (1, 1, 1, 1), **more})


def pvt_v1(**more) -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model("pvt_tiny", {**PYRAMID, "img_size": 32, **more})


def vit() -> nn.Module:
    torch.manual_seed(0)
    return shiftaddvit.create_model("vit_tiny_patch16_224", PLAIN)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
    model = reparameterize(pvt_v2(), replace(recipes["addernet"], adder=AdderConfig(norm))).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images(3))[:1], model(images(3)[:1]), rtol=1e-3, atol=1e-4)


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


# Adder attention


def heads(*shape: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator) * scale).requires_grad_() for _ in range(3)]


def adders(identity: bool = True) -> AdderAttention:
    return AdderAttention(nn.Identity(), nn.Identity(), 2, 8, AdderAttentionConfig(identity))


@pytest.mark.parametrize("identity", [True, False])
def test_adder_attention_equals_its_formula(identity):
    q, k, v = heads(2, 2, 11, 8)
    distances = (q.unsqueeze(3) - k.unsqueeze(2)).abs().sum(-1)
    expected = (-distances / 8**0.5).softmax(-1) @ v + (v if identity else 0)
    close(adders(identity).attend(q, k, v), expected)


def test_adder_attention_is_the_same_in_slices_of_queries(monkeypatch):
    results = []
    for limit in (1 << 27, 2 * 2 * 11 * 4):
        monkeypatch.setattr(adder_attention, "SCORES", limit)
        parts = heads(2, 2, 11, 8)
        y = adders().attend(*parts)
        y.square().sum().backward()
        results.append([y, *(part.grad for part in parts)])
    for whole, sliced in zip(*results, strict=True):
        close(sliced, whole)


def test_adder_attention_over_an_images_first_stage_holds_no_differences(monkeypatch):
    """3136 tokens of 32 channels: the differences would be 315 million numbers, the scores are 10 million, less in slices."""
    monkeypatch.setattr(adder_attention, "SCORES", 1 << 21)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    q, k, v = (part.detach() for part in heads(1, 1, 3136, 32))
    layer = AdderAttention(nn.Identity(), nn.Identity(), 1, 32)
    with torch.no_grad(), Largest() as largest:
        y = layer.attend(q, k, v)
    assert y.isfinite().all() and 0 < largest.elements <= 1 << 21


def test_identity_mapping_keeps_the_rank_that_averaging_loses():
    """Distances of far tokens average everything alike; the identity keeps every token apart."""
    q, k, v = heads(1, 2, 30, 8, scale=1e-3)
    rank = {identity: torch.linalg.matrix_rank(adders(identity).attend(q, k, v)[0, 0] / v.abs().max(), tol=1e-2).item() for identity in (True, False)}
    assert rank[True] == 8 and rank[False] <= 1


# Performer


def test_performer_approaches_softmax_attention_as_features_grow():
    q, k, v = heads(1, 1, 30, 16, scale=0.5)
    expected = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for count in (100, 2000, 40000):
        layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16, PerformerConfig(count, epsilon=0.0))
        errors.append(((layer.attend(q, k, v) - expected).norm() / expected.norm()).item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.03, errors


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_performer_stays_finite_for_large_and_for_zero_queries(epsilon):
    layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16, PerformerConfig(epsilon=epsilon))
    for scale in (0.0, 1e3, 1e6):
        parts = heads(1, 1, 9, 16, scale=scale)
        y = layer.attend(*parts)
        y.sum().backward()
        assert y.isfinite().all() and all(part.grad.isfinite().all() for part in parts), scale


def test_published_constant_is_added_to_features_and_batch_mates_do_not_matter():
    layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16)
    q, k, v = heads(2, 1, 9, 16)
    x, y = q[:1].detach() * 0.5, k[:1].detach() * 0.5
    seen, other = x @ layer.directions.t(), y @ layer.directions.t()
    phi = torch.exp(seen - x.square().sum(-1, keepdim=True) / 2 - seen.amax(-1, keepdim=True)) + 1e-4
    psi = torch.exp(other - y.square().sum(-1, keepdim=True) / 2 - other.amax()) + 1e-4
    expected = phi @ (psi.transpose(-2, -1) @ v[:1]) / (phi @ psi.sum(-2).unsqueeze(-1))
    close(layer.attend(q, k, v)[:1], expected)


def test_random_features_are_orthogonal_seeded_by_layer_and_saved(tmp_path):
    drawn = orthogonal_features(10, 8, torch.Generator().manual_seed(3))
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    close(unit[:8] @ unit[:8].t(), torch.eye(8))
    model = reparameterize(vit(), "performer")
    first, second = (block.attn.directions for block in model.blocks)
    assert not torch.equal(first, second) and torch.equal(first, reparameterize(vit(), "performer").blocks[0].attn.directions)
    other = reparameterize(vit(), replace(recipes["performer"], performer=PerformerConfig(seed=1)))
    assert not torch.equal(first, other.blocks[0].attn.directions)
    first.mul_(2)  # as if an older version had drawn differently
    shiftaddvit.save(model, tmp_path / "m.safetensors")
    assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors").blocks[0].attn.directions, first)
    assert performer.PerformerAttention(nn.Identity(), nn.Identity(), 1, 16).directions.shape == (44, 16)  # ⌊16 ln 16⌋


# Linear spatial reduction


def test_linear_reduction_is_timms_and_starts_from_the_summed_window():
    model = reparameterize(pvt_v2(), "sra-linear")
    before, after = pvt_v2().stages[0].blocks[0].attn, model.stages[0].blocks[0].attn
    close(after.sr.weight[:, :, 0, 0], before.sr.weight.sum((2, 3)))
    flat = torch.randn(1, 16, 1, 1).expand(1, 16, 56, 56)  # of a constant picture both convolutions see the same
    close(after.sr(after.pool(flat)), before.sr(flat)[:, :, :7, :7])
    timms = pvt_v2("pvt_v2_b2_li").stages[0].blocks[0].attn.state_dict()
    assert {key: value.shape for key, value in after.state_dict().items()} == {key: value.shape for key, value in timms.items()}
    assert model.stages[3].blocks[0].attn.pool is None  # the last stage keeps its attention
    already = reparameterize(pvt_v2("pvt_v2_b2_li"), "sra-linear")
    assert not already.shiftaddvit_report.used


def test_linear_reduction_needs_a_picture():
    with pytest.raises(UserError, match="blocks.0.attn .*'sra-linear': it is no attention with spatial reduction"):
        reparameterize(vit(), "sra-linear")
    with pytest.raises(UserError, match="block4.0.attn .*class token"):
        reparameterize(pvt_v1(), replace(recipes["sra-linear"], last_stage_softmax=False))


# Ecoformer: PVTv1 is NaN in the published table


def published_mix(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ecoformer's attention under mixed precision as published: all of it in float32 but Σ_j h_jᵀ v_j, which is a product in half."""
    tokens, bits = h.shape[-2:]
    context = (h.half().transpose(-2, -1) @ v.half()).float()
    return (h @ context + (bits + 1) * v) / ((h * h.sum(-2, keepdim=True)).sum(-1, keepdim=True) + tokens * (bits + 1))


def test_ecoformer_stays_finite_where_the_published_product_overflows_half_precision():
    """3136 tokens of one sign beyond 65504/3136 = 20.9 overflow; the rows of the context are then ±inf, whose sum is NaN."""
    torch.manual_seed(0)
    h = torch.where(torch.rand(1, 1, 3136, 16) < torch.rand(16), 1.0, -1.0)
    v = torch.randn(1, 1, 3136, 64) + 30
    assert not published_mix(h, v - 15).isnan().any() and published_mix(h, v).isnan().any()
    layer = EcoformerAttention(nn.Identity(), nn.Identity(), 1, 64)
    values = v.half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = layer.mix(h, h, values)
        y.float().square().sum().backward()
    assert y.dtype == torch.float16 and y.isfinite().all() and values.grad.isfinite().all()


def zero_queries(model: nn.Module) -> None:
    """Every query and key has length zero; the published code divides by it."""
    for block in model.block1:
        block.attn.q.weight.data.zero_(), block.attn.q.bias.data.zero_()


def equal_tokens(model: nn.Module) -> None:
    """All tokens of an image alike: the anchors are the tokens, so the kernel's width, their mean distance, is zero."""
    model.patch_embed1.proj.weight.data.zero_(), model.pos_embed1.data.zero_()


def huge_values(model: nn.Module) -> None:
    for block in model.block1:
        block.attn.kv.bias.data[16:] = 2000.0


HAZARDS = {"zero queries": zero_queries, "equal tokens": equal_tokens, "huge values": huge_values, "more anchors than tokens": lambda model: None}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("half", [False, True])
def test_ecoformer_on_pvt_v1_has_no_nan(hazard, half):
    model = pvt_v1()
    HAZARDS[hazard](model)
    anchors = 100 if hazard == "more anchors than tokens" else 20  # the first stage has 64 tokens, the third 4
    model = reparameterize(model, replace(recipes["ecoformer"], hash=HashConfig(anchors=anchors, steps=3, bits=8), last_stage_softmax=False))
    shiftaddvit.calibrate(model, images())
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss = F.cross_entropy(model.train()(images()).float(), torch.tensor([0, 1, 4]))
    (loss * (1024 if half else 1)).backward()
    assert loss.isfinite()
    broken = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not broken


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
