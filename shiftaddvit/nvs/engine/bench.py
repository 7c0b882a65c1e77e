"""Measure rendering: `python -m shiftaddvit.nvs.engine.bench --out nvs_speed.json`. Correct first, then timed.

A contender is right when its colours are at most twice as far from the float32 PyTorch model's as those of the same model under
torch.autocast; a wrong one has no time. Weights and pictures are random: time does not depend on them. What the budget of minutes does
not reach is written down as not run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.files import write_json
from shiftaddvit.ops.timing import ceilings, failure_noted
from shiftaddvit.train.step_graph import StepGraph

from ..batch import Batch, TrainingScene, draw_batch
from ..gnt import GNT, GNTConfig
from ..render import Renderer, make_renderer
from ..rows import ROWS
from ..scene import Scene
from ..sources import Rays, camera_rays
from ..step import add_gradients, precision_context
from . import deploy_gnt
from .bench_subjects import noise_scene, view_model
from .engine import RAYS, RayEngine
from .timing import step_times, wait
from .tune import tune_tiles

DEVICE = "cuda"
LEAST_TOLERANCE = 2e-2
"""Error (2-norm, relative) that any contender may have."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    width: int = 504
    """Of the picture, in pixels."""
    height: int = 378
    """Of the picture, in pixels."""
    samples: int = 192
    """Points along a ray."""
    rows: tuple[str, ...] = ("gnt", *ROWS)
    """Rows of the 3D table."""
    precision: str = "bf16"
    """Of every contender but `plain fp32`."""
    repeats: int = 5
    """Pictures timed, after two that warm up."""
    chunks: tuple[int, ...] = (1024, RAYS, 4096, 8192)
    """Rays at once that the fused engine is tried with, on the first row."""
    tune: bool = True
    """Measure tiles first and keep them in the user's cache."""
    minutes: float = 8.0
    """Budget; what comes after it is not run."""
    seed: int = 0
    """Of weights and pictures."""


def bench_rendering(plan: Plan, show: Callable[[str], None] = print, keep: Callable[[dict], None] = lambda result: None) -> dict:
    """Measure and return a JSON-able dict; `keep` gets the result so far after every row. UserError without a CUDA device."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError("measuring the engine needs a CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    end = time.monotonic() + 60 * plan.minutes
    scene, rows = noise_scene(plan.width, plan.height, plan.seed), []
    result: dict = {"conditions": conditions(DEVICE, **asdict(plan)), "ceilings": ceilings(torch.device(DEVICE)), "rows": rows}
    if plan.tune:
        result["tiles"] = {}
        for row in ("gnt", "gnt-add-shift", "gnt-add-shift-moe"):
            model = view_model(row, plan.samples, plan.seed).to(DEVICE)
            deployed = deploy_gnt(model, torch.bfloat16 if plan.precision == "bf16" else torch.float16)
            result["tiles"] |= tune_tiles(deployed, scene, RAYS, DEVICE, show)
        keep(result)
    for row, engine, precision, chunk in _contenders(plan):
        entry = {"row": row, "engine": engine, "precision": precision, "chunk": chunk}
        if time.monotonic() > end:
            rows.append(entry | {"status": "not run: out of time"})
        else:
            rows.append(entry)
            with failure_noted(entry):
                entry |= _measure(view_model(row, plan.samples, plan.seed), scene, plan, engine, precision, chunk)
            torch.cuda.empty_cache()
        show(" ".join(f"{name} {value}" for name, value in rows[-1].items() if name != "steps"))
        keep(result)
    result["ratios"] = ratios(rows)
    show(str(result["ratios"]))
    result["training_step_ms"] = {}
    for name, needs in (("eager", 20.0), ("graphed", 20.0), ("compiled", 150.0)):
        step: dict = {"status": "not run: out of time"}
        if time.monotonic() < end - needs:
            with failure_noted(step):
                step = {"status": "measured", "ms": training_step(scene, plan, name)}
        result["training_step_ms"][name] = step.get("ms")
        show(f"training step, {name}: " + (f"{step['ms']:.1f} ms" if "ms" in step else step["status"]))
        keep(result)
    return result


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """How many times faster each fused row is than the plain, the compiled and the fused GNT; the fastest chunk counts."""

    def best(row: str, engine: str, precision: str | None = None) -> float | None:
        found = [
            one["seconds"] for one in rows
            if one["row"] == row and one["engine"] == engine and "seconds" in one and precision in (None, one["precision"])
        ]  # fmt: skip
        return min(found, default=None)

    against = {
        "plain fp32": best("gnt", "plain", "fp32"), "plain half": best("gnt", "plain", "bf16") or best("gnt", "plain", "fp16"),
        "compiled": best("gnt", "compiled"), "fused gnt": best("gnt", "fused"),
    }  # fmt: skip
    mine = {row: best(row, "fused") for row in ("gnt", *ROWS)}
    return {row: {name: base / seconds for name, base in against.items() if base is not None} for row, seconds in mine.items() if seconds is not None}


def _contenders(plan: Plan) -> Iterator[tuple[str, str, str, int | None]]:
    """What matters most comes first."""
    yield "gnt", "plain", plan.precision, None
    for row in plan.rows:
        yield row, "fused", plan.precision, RAYS
    yield "gnt", "compiled", plan.precision, RAYS
    for chunk in plan.chunks:
        if chunk != RAYS:
            yield "gnt", "fused", plan.precision, chunk
            yield "gnt-add-shift", "fused", plan.precision, chunk
    yield "gnt", "plain", "fp32", None
    for row in plan.rows[1:]:
        yield row, "plain", plan.precision, None


def _measure(model: nn.Module, scene: Scene, plan: Plan, engine: str, precision: str, chunk: int | None) -> dict:
    renderer = make_renderer(deepcopy(model), scene, DEVICE, precision, chunk, engine)
    camera = scene.camera(0)
    error, usual = _error(renderer, model, plan.precision)
    found = {"error": error, "autocast_error": usual}
    if not error <= max(LEAST_TOLERANCE, 2 * usual):
        return found | {"status": "wrong"}
    for _ in range(2):
        renderer.render(camera)
    seconds = [renderer.render(camera).seconds for _ in range(plan.repeats)]
    steps = step_times(renderer.model, scene, RAYS, DEVICE) if isinstance(renderer.model, RayEngine) else None
    return found | {
        "status": "measured", "seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds), "rays_at_once": renderer.chunk.rays,
        "encode_seconds": renderer.encode_seconds, "memory_gib": torch.cuda.max_memory_allocated() / 2**30, "steps": steps,
    }  # fmt: skip


@torch.no_grad()
def _error(renderer: Renderer, model: nn.Module, precision: str) -> tuple[float, float]:
    """Relative errors (2-norm) of the colours of some rays against the float32 model without tf32: the renderer's, and autocast's."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    exact, cast = deepcopy(model).to(DEVICE), precision_context(DEVICE, precision)
    sources = renderer.bank.select(renderer.bank.order(renderer.scene.camera(0).pose)[: model.sources])
    every = camera_rays(renderer.scene.camera(0), *renderer.scene.depth_range, DEVICE)
    chosen = torch.linspace(0, len(every.pixel) - 1, RAYS, device=DEVICE).long()
    rays = Rays(*(part[chosen] for part in every[:3]), every.near, every.far)
    with precision_context(DEVICE, renderer.precision):
        found = renderer.model(rays, sources).rgb
    with cast:
        usual = exact(rays, sources).rgb
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    truth = exact(rays, sources).rgb
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return tuple(float((one - truth).norm() / truth.norm()) for one in (found, usual))


def training_step(scene: Scene, plan: Plan, mode: str, rays: int = 2048, samples: int = 64, steps: int = 20) -> float:
    """Milliseconds of a step of GNT as it is trained: 2048 rays, 64 points, the feature net on every source, Adam. Median.

    `graphed` replays recorded steps, as `cuda_graph` does; `compiled` does the same with torch.compile; `eager` launches every kernel.
    """
    torch.manual_seed(plan.seed)
    model = GNT(GNTConfig(samples=samples, dropout=0.0)).to(DEVICE).train()
    if mode == "compiled":
        for part in (model.net_coarse, model.feature_net):
            part.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=DEVICE == "cuda")

    def update(batch: Batch) -> Tensor:
        error = add_gradients(model, batch, plan.precision, None, rays)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return error

    graph = StepGraph(update, optimizer, note=lambda text: None) if mode != "eager" else None
    scenes, taken = [TrainingScene.of(scene, DEVICE)], []
    for step in range(steps + 5):
        begin = time.perf_counter()
        batch = draw_batch(scenes, step, plan.seed, rays, model.sources, 0)
        torch.manual_seed(step)
        if graph is not None and graph.takes(batch):
            graph.run(batch)
        else:
            update(batch)
        wait()
        taken.append(time.perf_counter() - begin)
    return median(taken[5:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nvs_speed.json"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--no-tune", action="store_true")
    given = parser.parse_args()
    plan = Plan(precision=given.precision, minutes=given.minutes, samples=given.samples, tune=not given.no_tune)
    bench_rendering(plan, lambda line: print(line, flush=True), lambda result: write_json(given.out, result))


if __name__ == "__main__":
    main()
