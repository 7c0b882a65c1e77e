"""View synthesis on a real GPU: kernels at the published sizes against their formulas, graphs, chunks, and memory that runs out."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import nvs_synthetic
from ops_checks import error, poisoned_outputs

from shiftaddvit.nvs.engine import deploy_gnt
from shiftaddvit.nvs.engine.steps import Target
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.render import make_renderer
from shiftaddvit.nvs.rows import ROWS
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.sources import Rays, camera_rays, encode_bank, make_bank
from shiftaddvit.nvs.train import NvsTrainConfig, train
from shiftaddvit.reparam import reparameterize
from shiftaddvit.train.run_folder import read_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of a colour."""


def close(actual, expected, bound):
    """Rays equal to within a relative `bound`, but for the few where a code or a route within rounding of its threshold fell on the other
    side (float32, gnt-add-shift-moe: one such route moves a colour by 5e-5, rounding alone by 4e-7); those are bounded together."""
    a, b = actual.double().flatten(1), expected.double().flatten(1)
    if not torch.isfinite(a).all():
        return False
    of_rays = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(b.norm(dim=1).mean() / 10)
    most, all_rays = float(of_rays.quantile(0.9)), error(actual, expected)
    print(f"nine of ten rays within {most:.1e}, together {all_rays:.1e}, bound {bound:.0e}")
    return most < bound and all_rays < max(bound, 2e-2)


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=12, width=72, height=56))


def lively(row, samples=192, **shape):
    torch.manual_seed(0)
    model = GNT(GNTConfig(samples=samples, sources=10, feature_base=16, dropout=0.0, **shape))
    if row is not None:
        reparameterize(model, row)
    with torch.no_grad():
        for name, parameter in model.net_coarse.named_parameters():
            if parameter.dim() == 1 or "token_conv" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().cuda()


def question(model, scene, rays):
    bank = encode_bank(make_bank(scene, scene.train, "cuda"), model)
    every = camera_rays(scene.camera(0), *scene.depth_range, "cuda")
    chosen = torch.linspace(0, len(every.pixel) - 1, rays).long()
    picked = Rays(*(part[chosen.cuda()] for part in every[:3]), every.near, every.far)
    return picked, bank.select(bank.order(scene.camera(0).pose)[: model.sources])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [None, *ROWS])
@torch.no_grad()
def test_every_row_renders_what_the_model_renders(row, dtype, scene):
    model = lively(row)
    asked = question(model, scene, 77)
    expected = model(*asked)
    engine = deploy_gnt(model, dtype)
    assert engine.program.unfused == ()
    found = engine(*asked)
    assert close(found.rgb, expected.rgb, TOLERANCE[dtype]), error(found.rgb, expected.rgb)
    assert close(found.depth[:, None], expected.depth[:, None], TOLERANCE[dtype]), error(found.depth, expected.depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [None, "gnt-add-shift-moe"])
@torch.no_grad()
def test_kernels_equal_their_formulas_step_by_step(row, dtype, scene):
    model = lively(row)
    rays, sources = question(model, scene, 61)
    fast, plain = deploy_gnt(model, dtype), deploy_gnt(model, dtype, backend="reference")
    depths = torch.linspace(rays.near, rays.far, model.samples, device="cuda")
    target = Target(rays.origin, rays.direction, depths, *fast.prepare(sources))
    x, geometry, q = plain.program.look_up.run(target, plain.launch)
    # bfloat16 has an eighth of float16's precision, and so eight times as many codes within rounding of their threshold.
    bound = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    with poisoned_outputs():
        for mine, theirs in zip(fast.program.look_up.run(target, fast.launch), (x, geometry, q), strict=True):
            assert error(mine, theirs) < bound
        for one, other in zip(fast.program.blocks, plain.program.blocks, strict=True):
            assert close(one.views.run(q, x, geometry, fast.launch), other.views.run(q, x, geometry, plain.launch), bound), one.views.attention.name
            rows = q.view(61, model.samples, -1)
            assert close(one.ray.run(rows, fast.launch), other.ray.run(rows, plain.launch), bound), one.ray.name
            if one.query is not None:
                # A point's last digit, which a fused multiply-add rounds once and two operations twice, alone moves the highest octave by 5e-6.
                assert error(one.query.run(q, target, fast.launch), other.query.run(q, target, plain.launch)) < max(bound, 3e-5), one.query.name


@torch.no_grad()
def test_replays_equal_the_first_run_and_follow_new_sources(scene):
    model = lively("gnt-add-shift")
    rays, sources = question(model, scene, 128)
    engine = deploy_gnt(model, torch.bfloat16)
    first = engine(rays, sources)
    again = engine(rays, sources)
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.depth, again.depth)
    bank = encode_bank(make_bank(scene, scene.train, "cuda"), model)
    others = bank.select(list(reversed(range(model.sources))))
    assert torch.equal(engine(rays, others).rgb, deploy_gnt(model, torch.bfloat16)(rays, others).rgb)
    assert torch.equal(engine(rays, sources).rgb, first.rgb)


def test_the_picture_does_not_depend_on_the_chunk_or_the_engine(scene):
    model = lively("gnt-add-shift-moe", 64)
    plain = make_renderer(model, scene, "cuda", engine="plain").render(scene.camera(0))
    for chunk in (1000, 4096):
        fused = make_renderer(model, scene, "cuda", chunk=chunk, engine="fused").render(scene.camera(0))
        # A ray whose routes or codes stand within rounding of their threshold may take the other side.
        off = ((fused.rgb - plain.rgb).abs().amax(-1) > 2e-3) | ((fused.depth - plain.depth).abs() > 1e-2 * plain.depth.abs())
        assert off.float().mean() < 0.01 and (fused.rgb - plain.rgb).abs().mean() < 2e-4, f"{float(off.float().mean()):.2%} of the rays are off"


def test_auto_takes_the_fused_engine_on_a_gpu(scene):
    assert make_renderer(lively(None, 16), scene, "cuda", "bf16").engine == "fused, bf16, triton kernels, CUDA graph"


def test_rendering_goes_on_with_half_the_chunk_when_memory_runs_out(scene):
    model = lively(None, 64)
    expected = make_renderer(model, scene, "cuda", chunk=256).render(scene.camera(0))
    share = 3 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        renderer = make_renderer(model, scene, "cuda", chunk=1 << 16)
        found = renderer.render(scene.camera(0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert renderer.chunk.rays < 1 << 16
    assert torch.allclose(found.rgb, expected.rgb, atol=1e-4)


@torch.no_grad()
def test_published_size_fits_a_chunk(scene):
    model = lively("gnt-add", depth=8)
    asked = question(model, scene, 2048)
    found = deploy_gnt(model, torch.bfloat16)(*asked)
    assert found.rgb.shape == (2048, 3) and torch.isfinite(found.rgb).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("row", [None, "nerf", "gnt-add-shift-moe"])
def test_recorded_training_steps_are_steps(tmp_path, scene, row, precision):
    """With as many forms of batches as there are numbers of source views, each recorded once. Sums of gradients of looked-up features come
    in any order on a GPU, and Adam makes whole steps of what is almost zero: two runs that record nothing say by how much that differs.
    The feature net, whose norms make differences of 1e-6 a thousand times as large, all but stands still."""
    found = []
    for number, graph in enumerate((True, False, False)):
        torch.manual_seed(0)
        shape = GNTConfig(width=32, depth=2, samples=12, sources=4, feature_base=8, feature_channels=8)
        model = NeRF(NeRFConfig(width=32, samples=12, fine_samples=12)).fit(scene) if row == "nerf" else GNT(shape)
        if row == "gnt-add-shift-moe":
            reparameterize(model, row)
        config = NvsTrainConfig(
            steps=24, rays=64, check_every=24, warmup_steps=4, source_jitter=1, lr_features=1e-9, precision=precision, measure_latency=False,
            cuda_graph=graph,
        )
        start = {name: value.clone() for name, value in model.named_parameters()}
        train(model, [scene], tmp_path / str(number), config, "cuda", show=False)
        log = read_log(tmp_path / str(number) / "log.jsonl")
        found.append((log, torch.cat([(value.detach().cpu() - start[name].cpu()).flatten() for name, value in model.named_parameters()])))
    notes = [[event["note"] for event in log if "note" in event] for log, _ in found]
    assert notes == [["steps are recorded as a CUDA graph"], [], []]
    losses = [next(event["train_psnr"] for event in log if "train_psnr" in event) for log, _ in found]
    assert abs(losses[0] - losses[1]) < 0.05
    (_, recorded), (_, eager), (_, again) = found
    noise = error(again, eager)
    print(row, precision, "recorded", error(recorded, eager), "again", noise)
    assert noise < 0.5 and error(recorded, eager) < 1.5 * noise + 1e-3
