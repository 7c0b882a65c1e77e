"""The engine computes what the model computes, for every family and recipe, and refuses what it cannot."""

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from engine_models import ADDERS, FAMILIES, PAIRS, PLAIN, PYRAMID, SIZE, converted, dense, images, randomised
from ops_checks import Capturable
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import shiftaddvit as sav
from shiftaddvit.engine import Engine, Launch, Program, deploy, lower
from shiftaddvit.engine.cpu.program import prepare
from shiftaddvit.engine.engine import largest_fitting
from shiftaddvit.engine.weights import Preparation
from shiftaddvit.errors import UserError
from shiftaddvit.layers.adder import AdderConfig
from shiftaddvit.layers.attention import AngularConfig, BinaryConfig
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig, ShiftLinear
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.conv_mlp import conv_mlp
from shiftaddvit.reparam import Recipe

FLOAT32 = 1e-4
RECIPES = tuple(sav.recipes)


@cache
def published() -> nn.Module:
    return converted("pvt_v2", "ours-quant-moe")


@torch.no_grad()
def error(engine: Engine | Program, model: nn.Module, x: torch.Tensor) -> float:
    """Largest error of the logits over their largest value, of the worst image but one: codes and routes are decisions, and a value
    within rounding of its threshold may fall on either side on another machine."""
    expected = model(x)
    y = engine.run(x) if isinstance(engine, Program) else engine(x)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    errors = ((y - expected).abs().amax(1) / expected.abs().max()).sort().values
    assert errors[-1] < 0.1
    return float(errors[-2])


def engine_of(model: nn.Module, **more) -> Engine:
    return deploy(model, image_size=SIZE, **more)


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


def test_result_of_an_image_does_not_depend_on_its_batch():
    engine, x = engine_of(published(), batch_size=(2, 4)), images(5)
    alone = torch.cat([engine(x[i : i + 1]) for i in range(5)])
    for order in (range(5), (4, 2, 0, 1, 3)):
        order = list(order)
        assert (engine(x[order]) - alone[order]).abs().max() < 1e-5


def test_result_is_a_copy():
    engine = engine_of(published())
    first = engine(images(1))
    kept = first.clone()
    engine(images(1, seed=5))
    assert torch.equal(first, kept)


def test_empty_batch_gives_no_logits():
    assert engine_of(published())(images(0)).shape == (0, 7)


def test_half_precision_images_are_taken():
    engine, x = engine_of(published()), images(1).half()
    assert torch.equal(engine(x), engine(x.float()))


def test_reload_reads_new_weights_into_the_same_buffers():
    for recipe in ("ours-quant-moe", "ours-ksh-moe"):
        first, second = converted("pvt_v2", recipe), randomised(converted("pvt_v2", recipe))
        engine = engine_of(first)
        places = [tensor.data_ptr() for tensor in engine.program.tensors()]
        before = engine(images(2))
        engine.reload(second)
        assert [tensor.data_ptr() for tensor in engine.program.tensors()] == places
        assert error(engine, second, images(3)) < FLOAT32
        assert not torch.allclose(before, engine(images(2)))


def test_reload_refuses_another_form_and_changes_nothing():
    engine = engine_of(published())
    before = engine(images(1))
    with pytest.raises(UserError, match=r"cannot reload.*stages\.0\.blocks\.0"):
        engine.reload(converted("pvt_v2", "ours-quant-add"))
    assert torch.equal(before, engine(images(1)))


def test_engine_keeps_its_weights_when_the_model_changes():
    model = dense("vit")
    engine = engine_of(model)
    before = engine(images(1))
    randomised(model)
    assert torch.equal(before, engine(images(1)))


def test_model_is_left_as_it_was():
    model = converted("vit", "ours-quant-moe").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine_of(model)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_two_engines_do_not_disturb_each_other():
    one, other = engine_of(published()), engine_of(dense("vit"))
    a, b = one(images(1)), other(images(1))
    assert torch.equal(a, one(images(1))) and torch.equal(b, other(images(1)))


def test_describe_names_every_step_and_what_is_not_fused():
    text = engine_of(published()).describe()
    for part in ("stages.0.blocks.0.attn", "context + apply", "mult|shift, add, mult|shift", "conv_gelu", "MB"):
        assert part in text
    ksh = engine_of(converted("pvt_v2", "ours-ksh-moe")).describe()
    line = next(line for line in ksh.splitlines() if line.startswith("stages.0.blocks.0.attn"))
    assert "AngularAttention" in line and " no " in line


def test_nothing_of_the_published_recipe_is_unfused_in_the_linear_stages():
    unfused = [step.name for step in lower(published(), image_size=SIZE).steps if not step.about().fused]
    assert unfused == []
    dense_steps = {step.name: step.about() for step in lower(dense("pvt_v2"), image_size=SIZE).steps}
    assert dense_steps["stages.0.blocks.0.attn"].fused, "a reduction by patch embedding is the package's own too"
    assert "patch_embed" in dense_steps["stages.0.blocks.0.attn"].ops


class Patched(VisionTransformer):
    pass


def compiled() -> nn.Module:
    """What torch.compile makes, as far as the engine can tell."""
    wrapper = nn.Module()
    wrapper._orig_mod = dense("vit")
    return wrapper


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: timm.create_model("resnet10t"), "no lowering for ResNet"),
        (lambda: Patched(**PLAIN), "no lowering for Patched"),
        (lambda: VisionTransformer(**PLAIN, norm_layer="rmsnorm"), r"norm1.*RmsNorm.*LayerNorm"),
        (lambda: VisionTransformer(**PLAIN, attn_layer="diff"), r"blocks\.0\.attn \(DiffAttention\)"),
        (lambda: VisionTransformer(**PLAIN, global_pool="map"), "global_pool = 'map'"),
        (lambda: VisionTransformer(**PLAIN, act_layer=nn.Tanh), r"blocks\.0\.mlp\.act \(activation Tanh\)"),
        (lambda: dense("pvt_v2", global_pool=""), "global_pool = ''"),
        (lambda: sav.reparameterize(dense("pvt_v2"), "ours-ksh-add"), "calibrate"),
        (lambda: nn.DataParallel(dense("vit")), "no lowering for DataParallel"),
        (compiled, "_orig_mod"),
    ),
)
def test_what_cannot_be_lowered_is_refused_by_name(make, message: str):
    with pytest.raises(UserError, match=message):
        deploy(make(), image_size=SIZE)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=()), "batch_size"),
        (dict(batch_size=2.0), "batch_size"),
        (dict(dtype=torch.float64), "float64"),
        (dict(device="mps"), "mps"),
        (dict(device="nowhere"), "nowhere"),
        (dict(backend="cuda"), "backend"),
        (dict(backend="cpu", dtype=torch.float16), "backend"),
        (dict(image_size=-1), "image_size"),
        (dict(image_size=65), "image_size=|image_size must"),
        (dict(pdl=True), "pdl"),
        (dict(tune_seconds=-1.0), "tune_seconds"),
    ),
)
def test_wrong_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        deploy(dense("vit"), **arguments)


@pytest.mark.parametrize(
    "x, message",
    (
        (torch.zeros(3, SIZE, SIZE), "must be"),
        (torch.zeros(1, 3, SIZE, 64), "32, 32"),
        (torch.zeros(1, SIZE, SIZE, 3), "channels last"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, SIZE, SIZE, device="meta"), "meta"),
        ([1.0], "list"),
    ),
)
def test_wrong_images_are_named(x, message: str):
    with pytest.raises(UserError, match=message):
        engine_of(published())(x)


@pytest.mark.parametrize("limit", (0, 1, 2, 37, 999))
def test_largest_fitting_batch_is_found(limit: int):
    found = largest_fitting(lambda size: size <= limit, 1000)
    assert found <= limit and found + max(1, found // 8) >= limit


def test_nan_reaches_the_logits_of_its_image_only():
    x = images(3)
    x[1, 0, 0, 0] = float("nan")
    y = engine_of(converted("vit", "ours-quant-moe"))(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_large_batches_go_through_wide_hidden_tensors_in_pieces(monkeypatch):
    model, x = converted("pvt_v2", "ours-quant-moe"), images(5)
    program = lower(model, torch.float32, SIZE)
    whole = program.run(x, Launch("reference"))
    seen = []
    monkeypatch.setattr("shiftaddvit.engine.mlp.conv_gelu", lambda h, *args, **more: seen.append(len(h)) or conv_gelu(h, *args, **more))
    step = next(step for step in program.steps if step.name == "stages.0.blocks.0.mlp")
    monkeypatch.setattr("shiftaddvit.engine.mlp.PIECE_BYTES", 2 * 2 * step.grid[0] * step.grid[1] * step.conv.shape[1] * 4)
    assert torch.allclose(program.run(x, Launch("reference")), whole, atol=1e-5)
    assert seen[:3] == [2, 2, 1] and 5 in seen


def test_an_mlp_in_one_op_is_the_same(monkeypatch):
    program, x = lower(converted("pvt_v2", "ours-quant-moe"), torch.float32, SIZE), images(3)
    expected, seen = program.run(x), []
    monkeypatch.setattr("shiftaddvit.engine.mlp.FUSED", True)
    monkeypatch.setattr("shiftaddvit.engine.mlp.FEWEST_TOKENS", 1)
    monkeypatch.setattr("shiftaddvit.engine.mlp.fits", lambda *args: True)
    monkeypatch.setattr("shiftaddvit.engine.mlp.conv_mlp", lambda x, *args: seen.append(len(x)) or conv_mlp(x, *args))
    assert torch.allclose(program.run(x), expected, atol=1e-5) and set(seen) == {3}


def test_float16_between_residuals_only_where_weights_leave_room():
    gpu, cpu = Preparation(torch.bfloat16, torch.device("cuda")), Preparation(torch.bfloat16, torch.device("cpu"))
    layer = nn.Linear(4, 4)
    assert gpu.inside(layer).dtype == torch.float16 and gpu.inside(layer).notes is gpu.notes
    assert cpu.inside(layer).dtype == torch.bfloat16, "a CPU multiplies bfloat16 faster"
    assert Preparation(torch.float32, gpu.device).inside(layer).dtype == torch.float32
    assert Preparation(torch.bfloat16, gpu.device, uniform=True).inside(layer).dtype == torch.bfloat16
    with torch.no_grad():
        layer.weight[0, 0] = 900
    assert gpu.inside(layer).dtype == torch.float16
    assert gpu.inside(layer, torch.full((4,), 2.0)).dtype == torch.bfloat16, "LayerScale multiplies the weights"
    shift = ShiftLinear.from_linear(nn.Linear(16, 8), ShiftConfig())
    packed = sav.pack(nn.Sequential(shift))
    assert gpu.inside(packed).dtype == torch.float16
    with torch.no_grad():
        packed[0].weight.fill_(2048)
    assert gpu.inside(packed).dtype == torch.bfloat16, "the weight in use, not a parameter"


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
