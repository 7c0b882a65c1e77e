"""Tile sizes of kernels: measured ones where the device has been tuned, otherwise a choice that fills the device."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from shiftaddvit.errors import UserError
from shiftaddvit.files import write_json

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Tile:
    """How one kernel launch is cut up. All sizes are powers of two."""

    m: int
    """Rows (tokens) of a program's tile."""
    n: int
    """Output channels of a program's tile."""
    k: int
    """Input channels taken at a time."""
    warps: int = 4
    """Warps of a program."""
    stages: int = 1
    """Depth of the load pipeline."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "stages" and value not in POWERS:
                raise UserError(f"Tile.{name} must be a power of two up to 2048, got {value}")


def next_power(value: int, least: int = 16) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels are interpreted, so that tiles stay few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fill(tile: Tile, m: int, n: int, device: torch.device, least_n: int = 32) -> Tile:
    """Halve the tile, rows first, then columns, until every multiprocessor has a program or the tile is 16 rows high."""
    wanted = processors(device)
    while -(-m // tile.m) * -(-n // tile.n) < wanted:
        if tile.m > 64:
            tile = replace(tile, m=tile.m // 2)
        elif tile.n > least_n:
            tile = replace(tile, n=tile.n // 2)
        elif tile.m > 16:
            tile = replace(tile, m=tile.m // 2)
        else:
            break
    return replace(tile, warps=8 if tile.m * tile.n >= 128 * 128 else 4)


def key(*parts: object) -> str:
    """The name of a problem in a table of tuned tiles, such as `norm_linear1/3136/256/32`."""
    return "/".join(str(part) for part in parts)


def precision(dtype: torch.dtype) -> str:
    """What a problem's name ends with: float32 takes several times the shared memory of half precision, so its tiles are others."""
    return "s" if dtype == torch.float32 else ""


def tuned(device: torch.device, problem: str) -> Tile | None:
    """The measured tile for this problem on this kind of GPU, if there is one."""
    if device.type != "cuda":
        return None
    entry = _table(torch.cuda.get_device_name(device)).get(problem)
    return Tile(**entry) if entry else None


@dataclass(frozen=True)
class Choice:
    """A tile that a launch used, and what else it could have used."""

    tile: Tile
    """The one in use."""
    bounds: Mapping[str, tuple[int, int]]
    """Fields that may change, and between which values."""


_HEARD: ContextVar[dict[str, Choice] | None] = ContextVar("choices", default=None)


def pick(device: torch.device, problem: str, usual: Tile, **bounds: tuple[int, int]) -> Tile:
    """The measured tile for this problem, or else the usual one. `bounds` are for whoever measures."""
    tile = tuned(device, problem) or usual
    heard = _HEARD.get()
    if heard is not None:
        heard[problem] = Choice(tile, bounds)
    return tile


@contextmanager
def listen() -> Iterator[dict[str, Choice]]:
    """Inside, every launch's choice of a tile is noted in the dict, by problem."""
    heard: dict[str, Choice] = {}
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)


@contextmanager
def trial(device: torch.device, problem: str, tile: Tile) -> Iterator[None]:
    """Use this tile for this problem inside the block."""
    table = _table(torch.cuda.get_device_name(device))
    before = table.get(problem)
    table[problem] = asdict(tile)
    try:
        yield
    finally:
        if before is None:
            del table[problem]
        else:
            table[problem] = before


def save_tuned(device: torch.device, tiles: Mapping[str, Tile], path: Path | None = None) -> Path:
    """Add measured tiles to a file, by default this device's table in the user's cache; returns the file."""
    path = path or cache_folder() / f"{_slug(torch.cuda.get_device_name(device))}.json"
    write_json(path, _read(path) | {problem: asdict(tile) for problem, tile in tiles.items()})
    _table.cache_clear()
    return path


def cache_folder() -> Path:
    """Where tables of this user's own devices are kept."""
    return Path(torch.hub.get_dir()).parent.parent / "shiftaddvit" / "tiles"


@cache
def _table(device_name: str) -> dict[str, dict[str, int]]:
    """Tiles that ship with the package, then those measured here."""
    name = f"{_slug(device_name)}.json"
    return _read(files("shiftaddvit") / "ops" / "tuned" / name) | _read(cache_folder() / name)


def _read(path) -> dict[str, dict[str, int]]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _slug(device_name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in device_name.lower())
