"""Measure the tiles of a program's kernels on this GPU.

Every launch says which tile it uses and what else it could use (`ops.tiling.listen`). From there each problem walks downhill, one field
at a time. All problems walk in step, so that a round's compilations, which take far longer than its measurements, are shared by many
processes; they meet in Triton's cache on disk.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic

import torch
from torch import Tensor

from shiftaddvit.ops import tiling
from shiftaddvit.ops.tiling import Tile
from shiftaddvit.ops.timing import copies_for, time_call

from .compilers import Job, compilers, tile_may_not_fit
from .program import Launch, Program, Step

GAIN = 0.99
"""A neighbour must be faster than this share of the best time."""
AGREEMENT = 0.02
"""Results of two tiles may be apart by this share of their norm: rounding, and the few rows that it sends to the other expert."""


@dataclass
class Walk:
    """One problem, and how far its search has come."""

    problem: str
    """Its name in the table of tiles."""
    step: int
    """The program's step that launches it."""
    shape: tuple[int, ...]
    """Of that step's input."""
    bounds: Mapping[str, tuple[int, int]]
    """Fields of the tile that may change, and between which values."""
    best: Tile
    """The fastest tile so far."""
    start_us: float = float("inf")
    """Time of the step with the tile it had."""
    best_us: float = float("inf")
    """Time with the best one."""
    seen: set[Tile] = field(default_factory=set)
    """Tiles measured."""
    done: bool = False
    """No neighbour is faster."""

    def candidates(self) -> list[Tile]:
        """What to measure next: at first the tile in use too."""
        around = [tile for tile in neighbours(self.best, self.bounds) if tile not in self.seen]
        return around if self.seen else [self.best, *around]

    def take(self, times: Mapping[Tile, float]) -> None:
        """Go to the fastest of the measured tiles, or stay for good."""
        if not self.seen:
            self.start_us = self.best_us = times[self.best]
        self.seen.update(times)
        fastest = min(times, key=times.__getitem__, default=self.best)
        if times and times[fastest] < GAIN * self.best_us:
            self.best, self.best_us = fastest, times[fastest]
        else:
            self.done = True


def neighbours(tile: Tile, bounds: Mapping[str, tuple[int, int]]) -> Iterator[Tile]:
    """Tiles that differ in one field by one step: doubled or halved, the pipeline one deeper or shallower."""
    for name, (low, high) in bounds.items():
        value = getattr(tile, name)
        steps = (value + 1, value - 1) if name == "stages" else (value * 2, value // 2)
        yield from (replace(tile, **{name: step}) for step in steps if low <= step <= high)


@torch.no_grad()
def walks_of(program: Program, batches: tuple[int, ...], launch: Launch = Launch(), measured_too: bool = False) -> list[Walk]:
    """The problems of a program at these batch sizes, each once: those without a measured tile, or all."""
    found: dict[str, Walk] = {}
    for batch in batches:
        x = torch.zeros(batch, program.channels, *program.image_size, dtype=program.dtype, device=program.device)
        for number, step in enumerate(program.steps):
            shape = tuple(x.shape)
            with tiling.listen() as heard:
                x = step.run(x, launch)
            for problem, choice in heard.items():
                if problem not in found and (measured_too or tiling.tuned(program.device, problem) is None):
                    found[problem] = Walk(problem, number, shape, choice.bounds, choice.tile)
    return list(found.values())


def tune(
    program: Program,
    batches: tuple[int, ...],
    launch: Launch = Launch(),
    seconds: float = 120.0,
    workers: int | None = None,
    measured_too: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Walk]:
    """Search tiles for the program's problems for at most about `seconds`; `progress` gets (problems settled, all).

    Nothing is kept: `ops.tiling.save_tuned` writes a table. The program must be on a GPU.
    """
    walks = walks_of(program, batches, launch, measured_too)
    if not walks:
        return []
    end = monotonic() + seconds
    workers = workers if workers is not None else max(1, min(16, (os.cpu_count() or 2) - 1))
    with compilers(program, launch, workers) as compile_all:
        while not all(walk.done for walk in walks) and monotonic() < end:
            going = [(walk, walk.candidates()) for walk in walks if not walk.done]
            compile_all([Job(walk.step, walk.shape, walk.problem, tile) for walk, tiles in going for tile in tiles], end)
            for walk, tiles in going:
                if monotonic() < end:
                    walk.take(_times(program.steps[walk.step], walk, tiles, launch, program))
            progress(sum(walk.done for walk in walks), len(walks))
    return walks


def tune_once(program: Program, batches: tuple[int, ...], launch: Launch, seconds: float) -> None:
    """Tune what has no measured tile on this kind of GPU and keep it in the user's cache, with a progress bar on a terminal. What the time
    did not reach keeps the tile it has, and is not tried again."""
    from rich.console import Console
    from rich.progress import Progress

    with torch.cuda.device(program.device), Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(f"tuning kernels for {torch.cuda.get_device_name(program.device)}, once", total=None)
        try:
            walks = tune(program, batches, launch, seconds, progress=lambda done, total: bar.update(task, completed=done, total=total))
        except torch.cuda.OutOfMemoryError:
            # The engine, which comes next, says which batch fits.
            return
    if walks:
        tiling.save_tuned(program.device, {walk.problem: walk.best for walk in walks})


def best_tiles(walks: list[Walk]) -> dict[str, Tile]:
    """What the walks found, by problem; those never measured are left out."""
    return {walk.problem: walk.best for walk in walks if walk.seen}


@torch.no_grad()
def _times(step: Step, walk: Walk, tiles: list[Tile], launch: Launch, program: Program) -> dict[Tile, float]:
    """Median microseconds of the step with each tile; infinity for one that does not fit the device, or whose result is another."""
    first = _input(walk, program)
    inputs = [(first,), *((torch.randn_like(first),) for _ in range(min(16, copies_for([first])) - 1))]
    run, expected = partial(step.run, launch=launch), step.run(first, launch).float()
    times = {}
    for tile in tiles:
        times[tile] = float("inf")
        with tiling.trial(program.device, walk.problem, tile), tile_may_not_fit():
            # Compilers have faults that show with some tiles only (docs/performance.md), and a wrong kernel can be a fast one.
            if (run(first).float() - expected).norm() <= AGREEMENT * expected.norm():
                times[tile] = time_call(run, inputs, seconds=0.02).median_us
    return times


def _input(walk: Walk, program: Program) -> Tensor:
    return torch.randn(walk.shape, device=program.device).to(program.dtype)
