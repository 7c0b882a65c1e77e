"""The engine computes what the model computes, for every family and recipe."""

from dataclasses import replace

import pytest
import torch
from engine_models import (
    ADDERS, FAMILIES, FLOAT32, PAIRS, PLAIN, PYRAMID, SIZE, converted, dense, engine_of, error, images, randomised,
)  # fmt: skip
from ops_checks import Capturable
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer

import shiftaddvit as sav
from shiftaddvit.engine import Launch, deploy, lower
from shiftaddvit.engine.cpu.program import prepare
from shiftaddvit.engine.weights import Preparation
from shiftaddvit.errors import UserError
from shiftaddvit.layers.adder import AdderConfig
from shiftaddvit.layers.attention import AngularConfig, BinaryConfig
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig
from shiftaddvit.reparam import Recipe

RECIPES = tuple(sav.recipes)
CASCADE = 5e-3
"""For shifts in front of adders: the shift's convolution sums in another order in the engine, on every backend."""


@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_engine_equals_model(family: str, recipe: str):
    model = converted(family, recipe)
    assert error(engine_of(model), model, images(3)) < FLOAT32


@pytest.mark.parametrize("recipe", ADDERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_networks_of_adders_are_right_as_a_whole_and_step_by_step(family: str, recipe: str):
    """The whole in the model's own order of operations; forms with another order one step at a time, before rounding is amplified."""
    model, x = converted(family, recipe), images(3)
    assert error(engine_of(model, backend="reference"), model, x) < (CASCADE if recipe == "shiftaddnet" else FLOAT32)
    program = lower(model, torch.float32, SIZE)
    for step, runner in zip(program.steps, prepare(program).runners, strict=True):
        expected = step.run(x, Launch("reference"))
        assert (runner.run(x) - expected).norm() < 1e-3 * expected.norm(), step.name
        x = expected


@pytest.mark.parametrize(("family", "recipe"), [("pvt_v2", recipe) for recipe in RECIPES] + [("pvt_v1", "ours-quant-moe"), ("vit", "ours-quant-moe")])
def test_every_program_can_be_captured(family: str, recipe: str):
    program = lower(converted(family, recipe), torch.float32, SIZE)
    with Capturable():
        program.run(images(2), Launch("reference"))


@pytest.mark.parametrize("norm", ("layer", "batch"))
@pytest.mark.parametrize("family", ("pvt_v2", "vit"))
def test_engine_equals_model_of_adders(family: str, norm: str):
    """One adder at a time, and all of them: linears, convolutions, behind shifts, in front of LayerScale."""
    for recipe in (
        Recipe(attn_linear="adder"), Recipe(mlp="shift-add"), Recipe(rest="shift-add", keep_ends=True), Recipe(mlp="adder", rest="adder", keep_ends=True),
    ):  # fmt: skip
        model = converted(family, replace(recipe, adder=AdderConfig(norm)), **({"init_values": 0.5} if family == "vit" else {}))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.uniform_(-9, -3), module.running_var.uniform_(0.5, 2)
        assert error(engine_of(model), model, images(3)) < 10 * FLOAT32


def test_engine_says_what_adders_are_and_refuses_what_it_cannot_lower():
    text = engine_of(converted("pvt_v2", "shiftaddnet")).describe()
    assert "shift+adder" in text and "patch_embed + adder + norm" in text
    assert "adder, mult" in engine_of(converted("vit", "adder-attention")).describe()
    with pytest.raises(UserError, match=r"cannot lower head \(NormedAdder\)"):
        engine_of(converted("vit", Recipe(rest="adder")))
    with pytest.raises(UserError, match="patch_embed.proj: its inputs are rounded to fixed point"):
        engine_of(converted("vit", Recipe(rest="shift", shift=ShiftConfig(fixed_point=True))))


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_dense_model(family: str):
    model = dense(family)
    assert error(engine_of(model), model, images(3)) < FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_gives_the_same_logits_as_latent(family: str):
    latent = converted(family, "ours-quant-moe")
    y = engine_of(latent)(images(2))
    assert torch.equal(y, engine_of(sav.pack(latent))(images(2)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("family, recipe", (("pvt_v2", "ours-quant-moe"), ("pvt_v1", "pvt-moe"), ("vit", "ours-quant-shift")))
def test_engine_on_interpreted_kernels_equals_model(family: str, recipe: str):
    model = converted(family, recipe)
    assert error(engine_of(model, backend="triton"), model, images(2)) < FLOAT32


VARIANTS = {
    "unit codes": Recipe(attention="linear", add="quant", angular=AngularConfig(unit_codes=True), binary=BinaryConfig(codes="plus-minus")),
    "similarity": Recipe(attention="linear", add="quant", angular=AngularConfig(output_norm="similarity")),
    "published": Recipe(attention="linear", add="quant", angular=AngularConfig.published()),
    "plus-minus, mean": Recipe(attention="linear", add="quant", binary=BinaryConfig("zero", "plus-minus"), angular=AngularConfig(local="mean")),
    "float, no conv": Recipe(attention="linear", angular=AngularConfig(token_conv=0, local="none", output_norm="none")),
    "last stage too": Recipe(attention="linear", add="quant", last_stage_softmax=False),
    "threshold over the batch": Recipe(attention="linear", add="quant", binary=BinaryConfig("tensor")),
    "paper's gate": Recipe(attention="linear", attn_linear="moe", mlp="moe", moe=MoEConfig(gate="paper")),
    "three experts": Recipe(attn_linear="moe", mlp="moe", moe=MoEConfig(experts=("mult", "shift", "shift"))),
    "fixed point": Recipe(attn_linear="shift", mlp="moe", shift=ShiftConfig(fixed_point=True)),
    "DeepShift-Q of 4 bits": Recipe(attn_linear="shift", mlp="shift", shift=ShiftConfig(variant="q", bits=4, channel_offset=False)),
    "by layer": Recipe(attention="linear", mlp="shift", overrides=(("*mlp.fc2", {"mlp": "mult"}),)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ("pvt_v2", "vit"))
def test_engine_equals_model_for_every_option(family: str, variant: str):
    model = converted(family, VARIANTS[variant])
    assert error(engine_of(model), model, images(3)) < FLOAT32


@pytest.mark.parametrize("gate", ("value-preserving", "paper"))
def test_engine_routes_whole_mlps(gate: str):
    model = converted("pvt_v1", Recipe(mlp="moe", moe=MoEConfig(router="mlp", gate=gate)))
    assert error(engine_of(model), model, images(3)) < FLOAT32


def test_engine_follows_switched_off_primitives():
    model = converted("pvt_v2", "ours-quant-moe")
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    assert error(engine_of(model), model, images(3)) < FLOAT32


VITS = {
    "distilled": (VisionTransformerDistilled, {}),
    "no classes": (VisionTransformer, dict(num_classes=0)),
    "distilled, no classes": (VisionTransformerDistilled, dict(num_classes=0)),
    "LayerScale": (VisionTransformer, dict(init_values=0.3)),
    "averaged": (VisionTransformer, dict(global_pool="avg")),
    "maximum": (VisionTransformer, dict(global_pool="avgmax", class_token=False)),
    "registers": (VisionTransformer, dict(reg_tokens=3, no_embed_class=True)),
    "q and k norms": (VisionTransformer, dict(qk_norm=True)),
    "norm before": (VisionTransformer, dict(pre_norm=True, qkv_bias=False)),
    "odd heads": (VisionTransformer, dict(num_heads=4)),
    "inner norm": (VisionTransformer, dict(scale_mlp_norm=True)),
}


@pytest.mark.parametrize("recipe", ("pvt", "ours-quant-moe"))
@pytest.mark.parametrize("variant", VITS)
def test_engine_equals_every_form_of_vit(variant: str, recipe: str):
    make, more = VITS[variant]
    torch.manual_seed(0)
    model = randomised(sav.reparameterize(randomised(make(**(PLAIN | more))), recipe))
    assert error(engine_of(model), model, images(3)) < FLOAT32


@pytest.mark.parametrize("recipe", ("pvt", "ours-quant-moe"))
def test_engine_equals_linear_pvt_v2(recipe: str):
    torch.manual_seed(0)
    model = randomised(sav.reparameterize(randomised(PyramidVisionTransformerV2(**PYRAMID, linear=True)), recipe))
    assert error(engine_of(model), model, images(3)) < FLOAT32


def test_pictures_need_not_be_square():
    model = converted("pvt_v2", "ours-quant-moe")
    x = torch.randn(3, 3, 32, 64)
    assert error(deploy(model, image_size=(32, 64)), model, x) < FLOAT32


def test_positions_follow_the_image_size():
    for model in (converted("pvt_v1", "ours-quant-moe"), dense("vit", dynamic_img_size=True)):
        assert error(deploy(model, image_size=48), model, images(3, size=48)) < FLOAT32


@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 3e-2), (torch.float16, 1e-2)))
def test_half_precision_engine_is_near_the_model(dtype: torch.dtype, tolerance: float):
    model = converted("pvt_v2", Recipe(attention="linear", mlp="shift"))
    assert error(engine_of(model, dtype=dtype), model, images(3)) < tolerance


@pytest.mark.parametrize(("family", "recipe"), [("pvt_v2", recipe) for recipe in RECIPES] + [("pvt_v1", "ours-quant-moe"), ("vit", "ours-quant-moe")])
@torch.no_grad()
def test_a_program_of_two_half_precisions_is_as_near_as_one(family, recipe, monkeypatch):
    """What a GPU's bfloat16 engine computes, by its references: float16 between residuals, bfloat16 along them."""
    model, x = converted(family, recipe), images(4)
    expected = model(x)
    one = lower(model, torch.bfloat16, SIZE).run(x.bfloat16(), Launch("reference"))
    seen = []
    monkeypatch.setattr(Preparation, "inside", lambda self, module, scale=None: seen.append(module) or replace(self, dtype=torch.float16))
    two = lower(model, torch.bfloat16, SIZE).run(x.bfloat16(), Launch("reference"))
    assert seen and two.dtype == torch.float32 and torch.isfinite(two).all()
    off = [float((y - expected).norm() / expected.norm()) for y in (two, one)]
    # Codes and routes within rounding of their thresholds move four images' logits by up to 5e-2.
    assert recipe in ADDERS or off[0] < max(8e-2, 2 * off[1]), off
