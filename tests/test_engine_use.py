"""An engine in use: batches, results, new weights, what it says of itself, and what it refuses."""

import pytest
import timm
import torch
from engine_models import FLOAT32, PLAIN, PYRAMID, SIZE, converted, dense, engine_of, error, images, published, randomised
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import shiftaddvit as sav
from shiftaddvit.cli.model_choice import settings_to_store
from shiftaddvit.engine import Launch, deploy, lower
from shiftaddvit.engine.engine import largest_fitting
from shiftaddvit.engine.weights import Preparation
from shiftaddvit.errors import UserError
from shiftaddvit.layers.shift import ShiftConfig, ShiftLinear
from shiftaddvit.ops.attn_block import attn_block
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.conv_mlp import conv_mlp


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


@pytest.mark.parametrize("recipe", (None, "ours-quant-moe"))
def test_a_file_that_knows_its_image_size_deploys_for_it(recipe, tmp_path):
    sizes = {}
    model = sav.create_model("pvt_v2_b0", PYRAMID)
    model = model if recipe is None else sav.reparameterize(model, recipe)
    for name, metadata in (("knows", settings_to_store((32, 64), 0.875, None)), ("does not", None)):
        sav.save(model, tmp_path / "model.safetensors", metadata=metadata)
        loaded = sav.load(tmp_path / "model.safetensors")
        sizes[name] = deploy(loaded).program.image_size
        if metadata:
            assert resolve_model_data_config(loaded)["crop_pct"] == 0.875
            assert deploy(loaded, image_size=96).program.image_size == (96, 96), "asked for, it is another"
            assert deploy(loaded)(torch.zeros(1, 3, 32, 64)).shape == (1, 7)
    assert sizes == {"knows": (32, 64), "does not": (224, 224)}


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
    monkeypatch.setattr("shiftaddvit.engine.mlp.FEWEST_TOKENS", 1)
    monkeypatch.setattr("shiftaddvit.engine.mlp.fits", lambda *args: True)
    monkeypatch.setattr("shiftaddvit.engine.mlp.conv_mlp", lambda x, *args: seen.append(len(x)) or conv_mlp(x, *args))
    assert torch.allclose(program.run(x), expected, atol=1e-5) and set(seen) == {3}


@pytest.mark.parametrize(("recipe", "taken"), [("ours-quant-moe", True), ("published", True), ("ours-ksh-moe", False), ("msa", False)])
def test_attention_in_one_op_is_the_same(monkeypatch, recipe, taken):
    model = published() if recipe == "published" else converted("pvt_v2", recipe)
    program, x, seen = lower(model, torch.float32, SIZE), images(3), []
    expected = program.run(x)
    monkeypatch.setattr("shiftaddvit.engine.attention.fits", lambda *args: True)
    monkeypatch.setattr("shiftaddvit.engine.attention.attn_block", lambda x, *args, **more: seen.append(x.shape[1]) or attn_block(x, *args, **more))
    # Of three linear stages of 64, 16 and 4 tokens; None is never.
    for fewest, stages in ((None, []), (3 * 16 + 1, [64]), (3 * 16, [64, 16]), (1, [64, 16, 4])):
        monkeypatch.setattr("shiftaddvit.engine.attention.FEWEST_TOKENS", fewest)
        seen.clear()
        assert torch.allclose(program.run(x), expected, atol=1e-5) and seen == (stages if taken else [])


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
