"""The deployed GNT renders what the model renders: every row, either backend, whatever the chunk, whatever the views' order."""

from contextlib import nullcontext
from dataclasses import replace

import nvs_synthetic
import pytest
import torch
from ops_checks import Capturable, error

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularConfig
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig
from shiftaddvit.nvs.engine import bench, deploy_gnt
from shiftaddvit.nvs.engine.steps import Target
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.projector import look_up, sample_depths
from shiftaddvit.nvs.render import make_renderer
from shiftaddvit.nvs.rows import ROWS
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.sources import Rays, Sources, camera_rays, encode_bank, make_bank
from shiftaddvit.reparam import Recipe, reparameterize

TINY = GNTConfig(width=64, depth=2, heads=4, samples=13, sources=3, feature_channels=20, feature_base=4, dropout=0.0)


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=6, width=40, height=36))


def question(model, scene, rays=5):
    """Some rays of a view, and sources with features."""
    bank = encode_bank(make_bank(scene, scene.train, "cpu"), model)
    camera = scene.camera(0)
    every = camera_rays(camera, *scene.depth_range)
    chosen = torch.linspace(0, len(every.pixel) - 1, rays).long()
    picked = Rays(*(part[chosen] for part in every[:3]), every.near, every.far)
    return picked, bank.select(bank.order(camera.pose)[: model.sources])


def lively(recipe=None, config=TINY):
    """A GNT whose vectors are not all ones and zeros, and whose token convolutions do something."""
    torch.manual_seed(0)
    model = GNT(config)
    if recipe is not None:
        reparameterize(model, recipe)
    with torch.no_grad():
        for name, parameter in model.net_coarse.named_parameters():
            if parameter.dim() == 1 or "token_conv" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.no_grad()
def differences(model, scene, backend="reference", dtype=torch.float32, rays=5):
    asked = question(model, scene, rays)
    expected, found = model(*asked), deploy_gnt(model, dtype, backend=backend)(*asked)
    assert found.rgb.dtype == torch.float32
    return error(found.rgb, expected.rgb), error(found.depth, expected.depth)


@pytest.mark.parametrize("row", [None, *ROWS])
def test_every_row_in_the_engine_is_the_model(row, scene):
    color, depth = differences(lively(row), scene)
    assert color < 1e-4 and depth < 1e-4
    assert deploy_gnt(lively(row), torch.float32).program.unfused == ()


@pytest.mark.parametrize("row", [None, *ROWS])
def test_every_row_can_be_captured(row, scene):
    engine = deploy_gnt(lively(row), torch.float32)
    rays, sources = question(engine, scene)
    depths = torch.linspace(rays.near, rays.far, engine.samples)
    target = Target(rays.origin, rays.direction, depths, *engine.prepare(sources))
    with Capturable():
        engine.program.run(target, engine.launch)


@pytest.mark.parametrize("row", [None, "gnt-add-shift-moe"])
def test_kernels_in_the_engine_are_the_model(row, scene):
    color, depth = differences(lively(row), scene, "triton", rays=3)
    assert color < 1e-4 and depth < 1e-4


def test_kernels_in_half_precision_stay_close(scene):
    color, depth = differences(lively("gnt-shift"), scene, "triton", torch.float16, rays=2)
    assert color < 2e-2 and depth < 2e-2


@pytest.mark.parametrize(
    ("recipe", "unfused"),
    [
        (Recipe(attention="linear", add="quant", angular=AngularConfig(output_norm="similarity")), "view_selftrans.0.attn"),
        (Recipe(mlp="moe", moe=MoEConfig(gate="paper")), "view_crosstrans.0.ff"),
        (Recipe(mlp="moe", moe=MoEConfig(router="mlp")), "view_selftrans.1.ff"),
        (Recipe(attn_linear="moe"), "view_crosstrans.1.attn"),
        (Recipe(attn_linear="shift", shift=ShiftConfig(fixed_point=True)), "view_crosstrans.0.attn"),
    ],
)
def test_what_has_no_kernel_runs_as_its_layer_and_is_named(recipe, unfused, scene):
    model = lively(recipe)
    color, depth = differences(model, scene)
    assert color < 1e-4 and depth < 1e-4
    assert f"net_coarse.{unfused}" in deploy_gnt(model, torch.float32).program.unfused


def test_narrow_heads_and_odd_widths_of_the_quickstart_work(scene):
    color, depth = differences(lively("gnt-add", replace(TINY, width=32)), scene)
    assert color < 1e-4 and depth < 1e-4


@torch.no_grad()
def test_permuting_views_and_repeating_rays_change_nothing(scene):
    model = lively("gnt-add-shift")
    engine = deploy_gnt(model, torch.float32)
    rays, sources = question(model, scene)
    expected = engine(rays, sources)
    order = torch.tensor([2, 0, 1])
    shuffled = engine(rays, Sources(*(part[order] for part in sources)))
    assert torch.allclose(expected.rgb, shuffled.rgb, atol=1e-5) and torch.allclose(expected.depth, shuffled.depth, atol=1e-4)
    first = engine(rays.chunk(0, 2), sources)
    assert torch.allclose(first.rgb, expected.rgb[:2], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_points_that_no_view_sees_are_finite_and_equal_the_model(scene, backend):
    model = lively()
    rays, sources = question(model, scene, 2)
    away = Rays(rays.origin, -rays.direction, rays.pixel, rays.near, rays.far)
    expected, found = model(away, sources), deploy_gnt(model, torch.float32, backend=backend)(away, sources)
    assert torch.isfinite(found.rgb).all() and error(found.rgb, expected.rgb) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_view_lookup_reads_what_the_projector_reads(scene, backend):
    model = lively()
    rays, sources = question(model, scene, 3)
    depths = sample_depths(len(rays.origin), model.samples, rays.near, rays.far, False, "cpu")
    seen = look_up(rays.origin[:, None] + depths[..., None] * rays.direction[:, None], rays.origin, sources)
    engine = deploy_gnt(model, torch.float32, backend=backend)
    target = (rays.origin, rays.direction, depths[0].contiguous(), *engine.prepare(sources))
    x, geometry, q = engine.program.look_up.run(type("T", (tuple,), {})(target), engine.launch)
    expected = model.net_coarse.rgbfeat_fc(seen.values)  # (R, S, V, C)
    assert error(x, expected.flatten(0, 1).transpose(0, 1)) < 1e-4
    assert error(q, expected.amax(dim=2).flatten(0, 1)) < 1e-4
    assert error(geometry[..., :4], seen.ray_diff.flatten(0, 1).transpose(0, 1)) < 1e-4
    assert torch.equal(geometry[..., 4:5], seen.mask.flatten(0, 1).transpose(0, 1))


def test_the_renderer_says_which_engine_it_chose(scene):
    chosen = make_renderer(lively(), scene, "cpu")
    assert chosen.engine == "plain PyTorch, fp32 (the fused engine is for GPUs: --engine fused asks for it)"
    fused = make_renderer(lively(), scene, "cpu", engine="fused")
    assert fused.engine.startswith("fused, fp32, reference backend")
    nerf = NeRF(NeRFConfig(width=16)).fit(scene)
    with pytest.raises(UserError, match="NeRF has no fused form"):
        make_renderer(nerf, scene, "cpu", engine="fused")
    with pytest.raises(UserError, match="unknown engine 'fussed'"):
        make_renderer(nerf, scene, "cpu", engine="fussed")
    with pytest.raises(UserError, match="width 16, 32, 64, 128, not 24"):
        deploy_gnt(GNT(replace(TINY, width=24)))


def test_the_benchmark_checks_times_and_compares(monkeypatch):
    """Everything but the clock of a GPU."""
    contenders = [("gnt", "plain", "bf16", None), ("gnt", "fused", "bf16", 64), ("gnt-add-shift", "fused", "bf16", 64)]
    for name, value in (
        ("bench.DEVICE", "cpu"), ("bench.RAYS", 32), ("bench.ceilings", lambda _: {}), ("bench._contenders", lambda _: iter(contenders)),
        ("bench.training_step", lambda *_: 1.0), ("bench_subjects.GNTConfig", lambda **more: replace(TINY, sources=10, samples=4)),
        ("tune.trial", lambda _, problem, tile: tried.setdefault(problem, set()).add(tile.k) or nullcontext()), ("tune.save_tuned", lambda *_: None), ("tune.alone", lambda call, **_: (call(), 1.0)[1]),
        ("timing.alone", lambda call, **_: (call(), 1.0)[1]),
    ):  # fmt: skip
        monkeypatch.setattr(f"shiftaddvit.nvs.engine.{name}", value)
    kept, tried = [], {}
    result = bench.bench_rendering(bench.Plan(width=40, height=36, repeats=1), lambda line: None, kept.append)
    assert [row["status"] for row in result["rows"]] == ["measured"] * 3, result["rows"]
    assert set(result["rows"][1]["steps"]) == {
        "look_up", "first.views", "first.query", "first.ray", "last.views", "last.ray", "weights", "color",
    }  # fmt: skip
    assert result["tiles"].keys() == {
        "view_attention11/10/64", "ray_transformer11/softmax/64", "ray_transformer11/token/64", "view_attention22/10/64",
        "ray_transformer22/token/64", "view_lookup/64/32",
    }  # fmt: skip
    # Mixtures hold two accumulators, so fewer hidden channels at a time: with more, compilers spill.
    assert tried["view_attention22/10/64"] == {32} and tried["ray_transformer22/token/64"] == {16} and tried["view_attention11/10/64"] == {64}
    assert result["ratios"]["gnt-add-shift"].keys() == {"plain half", "fused gnt"} and len(kept) >= 4


def test_autocast_around_the_engine_changes_nothing(scene):
    model = lively("gnt-add")
    engine = deploy_gnt(model, torch.float32)
    asked = question(model, scene)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = engine(*asked)
    outside = engine(*asked)
    assert torch.equal(inside.rgb, outside.rgb) and torch.equal(inside.depth, outside.depth)


def test_the_engine_renders_the_same_picture_in_any_chunk(scene):
    model = lively("gnt-add-shift")
    plain = make_renderer(model, scene, "cpu", engine="plain").render(scene.camera(0))
    for chunk in (100, 1000):
        fused = make_renderer(model, scene, "cpu", chunk=chunk, engine="fused").render(scene.camera(0))
        assert torch.allclose(fused.rgb, plain.rgb, atol=1e-4) and torch.allclose(fused.depth, plain.depth, rtol=1e-3)
