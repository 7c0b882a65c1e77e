"""The search for tiles: every launch of a program is found, walks go downhill and stop, other processes can hold a program."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine_models import converted

from shiftaddvit.engine import compilers, lower, tune
from shiftaddvit.engine.program import Launch
from shiftaddvit.ops import tiling
from shiftaddvit.ops.tiling import Tile

BOUNDS = {"m": (16, 128), "n": (32, 64), "warps": (4, 8), "stages": (1, 4)}


def test_neighbours_stay_in_bounds():
    tiles = list(tune.neighbours(Tile(16, 32, 64, 4, 1), BOUNDS))
    assert [(t.m, t.n, t.warps, t.stages) for t in tiles] == [(32, 32, 4, 1), (16, 64, 4, 1), (16, 32, 8, 1), (16, 32, 4, 2)]


def test_a_walk_goes_downhill_and_stops_at_the_bottom():
    def time(tile: Tile) -> float:
        return 10 + abs(tile.m - 64) + abs(tile.n - 64) + 5 * (tile.stages - 3) ** 2 + tile.warps

    walk = tune.Walk("p", 0, (1,), BOUNDS, Tile(16, 32, 64, 8, 1))
    rounds = 0
    while not walk.done:
        walk.take({tile: time(tile) for tile in walk.candidates()})
        rounds += 1
    assert walk.best == Tile(64, 64, 64, 4, 3)
    assert walk.start_us == time(Tile(16, 32, 64, 8, 1)) and walk.best_us == time(walk.best)
    assert rounds == 7  # six steps, and one look around the bottom
    assert tune.best_tiles([walk, replace(walk, problem="unseen", seen=set())]) == {"p": walk.best}


def test_a_tile_that_does_not_fit_is_never_the_best():
    walk = tune.Walk("p", 0, (1,), BOUNDS, Tile(16, 32, 64, 4, 1))
    walk.take({tile: float("inf") if tile.m > 16 else 5.0 for tile in walk.candidates()})
    assert walk.done and walk.best.m == 16


def test_every_launch_of_a_program_is_found_once_a_shape():
    program = lower(converted("pvt_v2", "ours-quant-moe"), torch.float32, (32, 32))
    walks = tune.walks_of(program, (1, 2), Launch("triton"))
    kinds = {walk.problem.split("/")[0] for walk in walks}
    assert {"contexts", "applys", "norm_linear2s", "linear2s", "conv_gelus", "patch_embedns"} <= kinds
    assert len({walk.problem for walk in walks}) == len(walks)
    for walk in walks:
        assert program.steps[walk.step].run(torch.zeros(walk.shape), Launch("triton")) is not None


def test_the_reference_has_no_tiles():
    assert tune.walks_of(lower(converted("pvt_v2", "ours-quant-moe"), torch.float32, (32, 32)), (1,), Launch("reference")) == []
    assert tune.tune(lower(converted("pvt_v2", "ours-quant-moe"), torch.float32, (32, 32)), (1,), Launch("reference")) == []


def test_listening_hears_only_inside():
    device = torch.device("cpu")
    with tiling.listen() as heard:
        assert tiling.pick(device, "inside", Tile(16, 32, 64), m=(16, 32)) == Tile(16, 32, 64)
    tiling.pick(device, "outside", Tile(16, 32, 64))
    assert heard == {"inside": tiling.Choice(Tile(16, 32, 64), {"m": (16, 32)})}


def test_a_process_holds_the_program_and_answers_every_job(tmp_path):
    program = lower(converted("pvt_v2", "ours-quant-moe"), torch.float32, (32, 32))
    torch.save((program, Launch("reference")), tmp_path / "program.pt")
    line = '{"step": 0, "shape": [1, 3, 32, 32], "problem": "p", "tile": {"m": 16, "n": 32, "k": 64, "warps": 4, "stages": 1}}\n'
    command = [sys.executable, "-c", HELD, str(tmp_path / "program.pt"), "cpu"]
    done = subprocess.run(command, input=2 * line, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\ndone\n", done.stderr[-2000:]


HELD = """
import contextlib, sys
from shiftaddvit.engine import compilers
# Without a GPU there is no table to put the tile into.
compilers.tiling.trial = lambda device, problem, tile: contextlib.nullcontext()
compilers.main(*sys.argv[1:])
"""


def test_one_worker_compiles_nothing_ahead():
    with compilers.compilers(None, Launch(), 1) as compile_all:
        compile_all([compilers.Job(0, (1,), "p", Tile(16, 32, 64))], 0.0)


def test_only_a_tile_that_does_not_fit_is_passed_over():
    from triton.runtime.errors import OutOfResources

    for error in (OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")):
        with compilers.tile_may_not_fit():
            raise error
    with pytest.raises(RuntimeError, match="illegal memory access"), compilers.tile_may_not_fit():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
