"""The tiles of the kernels that render, measured."""

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from shiftaddvit.engine.tune import AGREEMENT
from shiftaddvit.ops.tiling import Tile, key, save_tuned, trial
from shiftaddvit.ops.timing import failure_noted

from ..scene import Scene
from .bench_subjects import rays_of
from .engine import RayEngine
from .timing import alone


def tune_tiles(engine: RayEngine, scene: Scene, rays: int, device: str, show: Callable[[str], None]) -> dict[str, dict]:
    """Try the tiles of the three widest kernels on one chunk of `rays` and keep the fastest of each in the user's cache."""
    target, place = rays_of(scene, engine, rays, device), torch.device(device)
    program, launch = engine.program, engine.launch
    x, geometry, q = program.look_up.run(target, launch)
    block, c, rows = program.blocks[0], q.shape[-1], q.view(rays, -1, q.shape[-1])
    feed = block.ray.feed.feed
    experts = f"{feed.weight1.shape[0]}{feed.weight2.shape[0]}"
    from shiftaddvit.ops.ray_transformer.triton import ray_tile
    from shiftaddvit.ops.view_attention.triton import view_tile

    views, ray = view_tile(len(x), c, experts, True, place), ray_tile(c, block.ray.form, experts, True, place)
    # Few, because every one is compiled first; hidden channels stay as many as fit the registers. Not 64 points on 8 warps where the sums of
    # products are of several lengths: CUDA 12.8's assembler miscompiles them (docs/performance.md).
    trials = {
        key(f"view_attention{experts}", len(x), c): (
            lambda: block.views.run(q, x, geometry, launch),
            [replace(views, m=m, warps=warps, stages=stages) for m, warps in ((32, 4), (64, 4), (128, 8)) for stages in (1, 2)],
        ),
        key(f"ray_transformer{experts}", block.ray.form, c): (
            lambda: block.ray.run(rows, launch),
            [replace(ray, m=m, n=n, warps=warps) for m, warps in ((32, 4), (64, 4)) for n in (2, 4)],
        ),
        key("view_lookup", c, program.feature_channels): (
            lambda: program.look_up.run(target, launch),
            [Tile(m, c, program.feature_channels, warps) for m, warps in ((32, 4), (64, 4), (128, 8))],
        ),
    }
    best: dict[str, tuple[Tile, float]] = {}
    for problem, (call, tiles) in trials.items():
        expected = _flat(call())
        for tile in tiles:
            tried: dict = {}
            with trial(place, problem, tile), failure_noted(tried):
                off = float((_flat(call()) - expected).norm() / expected.norm())
                if off < AGREEMENT:
                    tried["us"] = alone(call)
                else:
                    tried["status"] = f"left out: its result is off by {off:.0e}"
            if "us" not in tried:
                show(f"{problem} {tile}: {tried['status']}")
            elif problem not in best or tried["us"] < best[problem][1]:
                best[problem] = (tile, tried["us"])
        if problem in best:
            show(f"{problem}: {best[problem][0]} {best[problem][1]:.0f} µs")
    save_tuned(place, {problem: tile for problem, (tile, _) in best.items()})
    return {problem: asdict(tile) | {"us": taken} for problem, (tile, taken) in best.items()}


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.float().flatten() for part in (result if isinstance(result, tuple) else (result,))])
