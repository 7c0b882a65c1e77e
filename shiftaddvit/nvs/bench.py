"""Seconds an image, measured, beside modelled joules: two columns that never mix. Published figures have a column of their own."""

import statistics
from dataclasses import dataclass

import torch
from torch import nn

from shiftaddvit.conditions import conditions
from shiftaddvit.cost import energy
from shiftaddvit.published import view_synthesis
from shiftaddvit.schema import stamped

from .render import Engine, make_renderer
from .rows import ROWS
from .scene import Scene


@dataclass(frozen=True)
class Timing:
    """One row, timed."""

    row: str
    """Which model."""
    seconds: float
    """Median seconds an image, features of the source views not counted."""
    fastest: float
    """The fastest image."""
    slowest: float
    """The slowest image."""
    encode_seconds: float
    """For the features of all source views, once a scene."""
    rays_at_once: int
    """Chunk after any halving."""
    engine: str
    """What rendered, in words."""
    joules: float | None
    """Modelled for the published network (GNT of depth 4, 192 samples, 10 views; NeRF of 64 + 128) at this picture size, analytical
    Eyeriss model, mode `eyeriss`; None where not run."""
    joules_paper: float | None
    """The same in mode `paper`, as the published figures were made."""


def time_row(
    row: str,
    model: nn.Module,
    scene: Scene,
    device: torch.device | str,
    precision: str = "fp32",
    repeats: int = 3,
    engine: Engine = "auto",
    chunk: int | None = None,
) -> Timing:
    """Render the first held-out (or first) view `repeats` times after one warm-up that fits the chunk to the memory."""
    renderer = make_renderer(model, scene, device, precision, chunk, engine)
    camera = scene.camera(scene.test[0] if scene.test else 0)
    renderer.render(camera)
    seconds = [renderer.render(camera).seconds for _ in range(repeats)]
    return Timing(row, statistics.median(seconds), min(seconds), max(seconds), renderer.encode_seconds, renderer.chunk.rays, renderer.engine, *modelled_joules(row, scene.height, scene.width))


def modelled_joules(row: str, height: int, width: int) -> tuple[float | None, float | None]:
    """Joules an image of the published network of this row, modes `eyeriss` and `paper`; None for a row that is not in the table."""
    if row not in ("nerf", "gnt", *ROWS):
        return None, None
    model, recipe = (row, "dense") if row in ("nerf", "gnt") else ("gnt", row)
    eyeriss, paper = (energy(model, recipe=recipe, mode=mode, image_size=(height, width)).total_mj / 1e3 for mode in ("eyeriss", "paper"))
    return eyeriss, paper


def bench_result(
    timings: list[Timing], scene: Scene, device: torch.device | str, precision: str, repeats: int, seed: int = 0
) -> dict[str, object]:
    """JSON values with their conditions; speed-ups are over the row `gnt` where it was timed."""
    published = {row.row: row for row in view_synthesis()}
    base = next((timing.seconds for timing in timings if timing.row == "gnt"), None)
    rows = [
        vars(timing)
        | {
            "speed_up": base / timing.seconds if base is not None else None,
            "published_seconds": published[timing.row].seconds if timing.row in published else None,
            "published_joules": published[timing.row].joules if timing.row in published else None,
        }
        for timing in timings
    ]
    facts = conditions(device, seed=seed, precision=precision, warm_up=1, repeats=repeats)
    return stamped("nvs-bench", {"scene": scene.name, "width": scene.width, "height": scene.height, "rows": rows, "conditions": facts})
