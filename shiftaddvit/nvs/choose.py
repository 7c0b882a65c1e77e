"""From what a user names (a file, a floor, a row, a path) to the thing itself."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.reparam import recipes, reparameterize

from .floors import Nearest, Sweep
from .gnt import GNT, GNTConfig
from .gnt.checkpoints import load_published
from .inspect import inspect_scene
from .nerf import NeRF, NeRFConfig
from .paths import held_out, interpolated, read_path, spiral
from .rows import ROWS
from .scene import Camera, Scene
from .state import load_model

PATHS = ("auto", "held-out", "spiral", "interpolated")


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}; allowed: auto, cpu, cuda, cuda:1 …") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_any(source: str | os.PathLike, samples: int | None = None) -> nn.Module:
    """A floor by name, a run's `.safetensors`, or a published `.pth`; `samples` along a ray if not as trained."""
    if str(source) in ("nearest", "sweep"):
        return Nearest() if str(source) == "nearest" else Sweep()
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such model; allowed: a .safetensors of 'nvs train', a published GNT .pth, nearest, sweep")
    model = load_model(path) if path.suffix == ".safetensors" else load_published(path)
    if samples is not None:
        if samples < 2:
            raise UserError(f"samples = {samples}; allowed: 2 and more")
        model.samples = samples
        model.config = replace(model.config, samples=samples)
    return model


def check_recipe(recipe: str | None) -> None:
    """UserError for what the command line does not convert to: a name that is no row of the 3D table. A TOML file may say anything, and from
    Python `reparameterize` takes every recipe."""
    if recipe is None or recipe in ROWS or Path(recipe).suffix == ".toml":
        return
    if recipe in recipes:
        raise UserError(f"recipe {recipe!r} is for image classifiers, none of the 3D rows; allowed: {', '.join(ROWS)}, or a .toml file")
    raise unknown("recipe", recipe, (*ROWS, "a .toml file"))


def choose_model(
    kind: str, start: Path | None, recipe: str | None, shape: dict[str, int | None], scene: Scene, seed: int
) -> GNT | NeRF:
    """A fresh GNT or NeRF, or the one in `start`, converted with `recipe` if given. UserError where `shape` contradicts the file."""
    asked = {field: value for field, value in shape.items() if value is not None}
    torch.manual_seed(seed)
    if start is not None:
        model: GNT | NeRF = _started(start, asked)
    elif kind == "nerf":
        ndc = inspect_scene(scene).forward_facing
        wrong = sorted(asked.keys() - {"samples", "width"})
        if wrong:
            raise UserError(f"NeRF has no {wrong[0]}; allowed: samples, model width")
        model = NeRF(NeRFConfig(**asked, ndc=ndc)).fit(scene)
    else:
        model = GNT(GNTConfig(**asked))
    if recipe is None:
        return model
    if recipe != getattr(getattr(model, "shiftaddvit_recipe", None), "name", None):
        reparameterize(model, recipe)
    return model


def _started(path: Path, asked: dict[str, int]) -> GNT | NeRF:
    model = load_any(path)
    if isinstance(model, Nearest | Sweep):
        raise UserError(f"{path} learns nothing; start from a trained model")
    for field in ("width", "depth"):
        have = getattr(model.config, field, None)
        if field in asked and asked[field] != have:
            raise UserError(f"{path} is a model of {field} {have}, but {field} {asked[field]} was asked")
    changes = {field: asked[field] for field in ("samples", "sources") if field in asked}
    model.config = replace(model.config, **changes)
    model.samples = model.config.samples
    if isinstance(model, GNT):
        model.sources = model.config.sources
    return model


def choose_path(path: str, scene: Scene, frames: int) -> list[Camera]:
    """A camera path by name, or the user's own from a JSON file. `auto` is a spiral where the scene faces one way, else past the captured views."""
    if path == "auto":
        path = "spiral" if inspect_scene(scene).forward_facing else "interpolated"
    if path == "held-out":
        return held_out(scene)
    if path == "spiral":
        return spiral(scene, frames)
    if path == "interpolated":
        return interpolated(scene, frames)
    if path.endswith(".json"):
        return read_path(path, scene)
    raise unknown("path", path, (*PATHS, "a .json file"))


def row_model(row: str, scene: Scene, samples: int | None) -> tuple[str, nn.Module]:
    """A row of the 3D table with random weights (for timing), or NAME=FILE: that file's model under that name."""
    name, _, file = row.partition("=")
    if file:
        return name, load_any(file, samples)
    shape = {} if samples is None else {"samples": samples}
    torch.manual_seed(0)
    if name == "nerf":
        return name, NeRF(NeRFConfig(**shape)).fit(scene)
    if name == "gnt":
        return name, GNT(GNTConfig(**shape))
    if name in ROWS:
        return name, reparameterize(GNT(GNTConfig(**shape)), name)
    if name in ("nearest", "sweep"):
        return name, load_any(name)
    raise unknown("row", name, ("nerf", "gnt", *ROWS, "nearest", "sweep"))
