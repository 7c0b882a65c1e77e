"""Time of single steps on a GPU."""

from collections.abc import Callable
from statistics import median

import torch

from ..scene import Scene
from .bench_subjects import rays_of
from .engine import RayEngine


@torch.no_grad()
def step_times(engine: RayEngine, scene: Scene, rays: int, device: str) -> dict[str, float]:
    """Microseconds of every step on one chunk of `rays`, each alone, in the order of the program."""
    program, launch = engine.program, engine.launch
    target = rays_of(scene, engine, rays, device)
    found = {"look_up": alone(lambda: program.look_up.run(target, launch))}
    x, geometry, q = program.look_up.run(target, launch)
    rows = q.view(rays, -1, q.shape[-1])
    for number, block in enumerate(program.blocks[:1] + program.blocks[-1:]):
        name = ("first", "last")[number]
        found[f"{name}.views"] = alone(lambda block=block: block.views.run(q, x, geometry, launch))
        if block.query is not None:
            found[f"{name}.query"] = alone(lambda block=block: block.query.run(q, target, launch))
        found[f"{name}.ray"] = alone(lambda block=block: block.ray.run(rows, launch))
    found["weights"] = alone(lambda: program.weights.run(rows, launch))
    found["color"] = alone(lambda: program.color.run(rows, launch))
    return found


def alone(call: Callable[[], object], repeats: int = 10) -> float:
    """Median microseconds of a call that fills the device."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait()
    return median(before.elapsed_time(after) * 1e3 for before, after in zip(marks, marks[1:], strict=False))


def wait() -> None:
    """Until the device is done."""
    torch.cuda.synchronize()
