"""Tiles: they fill the device, and a measured one replaces the choice."""

import json

import pytest
import torch

from shiftaddvit.errors import UserError
from shiftaddvit.ops import tiling
from shiftaddvit.ops.backends import choose_backend
from shiftaddvit.ops.tiling import Tile
from shiftaddvit.engine.tune import neighbours

GPU = torch.device("cuda")


@pytest.fixture
def big_device(monkeypatch, tmp_path):
    monkeypatch.setattr(tiling, "processors", lambda device: 132)
    monkeypatch.setattr(tiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU, 80GB")
    tiling._table.cache_clear()
    yield tmp_path
    tiling._table.cache_clear()


def test_large_problems_keep_large_tiles_and_small_ones_fill_the_device(big_device):
    assert tiling.fill(Tile(128, 128, 64), 100352, 512, GPU).m == 128
    small = tiling.fill(Tile(128, 128, 64), 196, 640, GPU)
    assert small.m * small.n < 128 * 128 and small.m >= 16 and small.n >= 32
    assert tiling.fill(Tile(128, 128, 64), 1, 16, GPU).m == 16


def test_measured_tiles_are_kept_and_read_back(big_device):
    problem = tiling.key("norm_linear1", 10, 20, 30)
    assert tiling.tuned(GPU, problem) is None
    tile = Tile(32, 64, 64, 8, 2)
    with tiling.trial(GPU, problem, tile):
        assert tiling.tuned(GPU, problem) == tile
    assert tiling.tuned(GPU, problem) is None
    path = tiling.save_tuned(GPU, {problem: tile})
    assert json.loads(path.read_text())[problem]["warps"] == 8
    assert tiling.tuned(GPU, problem) == tile
    assert tiling.tuned(torch.device("cpu"), problem) is None


def test_neighbours_stay_in_bounds():
    tiles = list(neighbours(Tile(16, 32, 64, 4, 1), {"m": (16, 128), "n": (32, 64), "warps": (4, 8), "stages": (1, 4)}))
    assert [(t.m, t.n, t.warps, t.stages) for t in tiles] == [(32, 32, 4, 1), (16, 64, 4, 1), (16, 32, 8, 1), (16, 32, 4, 2)]


def test_a_tile_is_made_of_powers_of_two():
    with pytest.raises(UserError, match="Tile.m must be a power of two"):
        Tile(48, 64, 64)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    x = torch.zeros(1)
    assert choose_backend("auto", x) == "reference" and choose_backend("auto", x, ("reference", "cpu")) == "cpu"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="need a CUDA device, the tensor is on cpu; use 'reference'"):
        choose_backend("triton", x)
    with pytest.raises(UserError, match="no backend 'cpu': allowed: auto, reference, triton"):
        choose_backend("cpu", x)
