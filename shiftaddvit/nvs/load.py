"""From a folder to a `Scene`, whichever of the three layouts it has."""

import os
from dataclasses import replace
from pathlib import Path

from shiftaddvit.errors import UserError

from .colmap import model_folder, read_colmap
from .llff import read_llff
from .scene import Scene, normalise
from .transforms_json import read_transforms


def load_scene(
    folder: str | os.PathLike,
    width: int | None = None,
    step: int = 8,
    near: float | None = None,
    far: float | None = None,
    normalised: bool = True,
) -> Scene:
    """The scene in `folder`: `poses_bounds.npy` (LLFF), `transforms.json`, or a COLMAP model in `sparse/`.

    `width` shrinks the pictures; `step` holds out every so-many-th view for test (0: none) unless the file has a split; `near` and `far`
    replace the bounds of every view, in the file's units. `normalised` is the world that models are trained in (docs/nvs.md).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if near is not None and far is not None and not 0 < near < far:
        raise UserError(f"--near {near:g} --far {far:g}: 0 < near < far is needed")
    if (folder / "poses_bounds.npy").is_file():
        scene = read_llff(folder, width, step)
    elif (folder / "transforms.json").is_file():
        scene = read_transforms(folder, width, step, near, far)
    elif model_folder(folder) is not None:
        scene = read_colmap(folder, width, step)
    else:
        raise UserError(
            f"{folder}: no poses_bounds.npy, transforms.json or sparse/ here; for a folder of photos run: shiftaddvit nvs prepare {folder}"
        )
    if near is not None or far is not None:
        bounds = scene.bounds.clone()
        if near is not None:
            bounds[:, 0] = near
        if far is not None:
            bounds[:, 1] = far
        scene = replace(scene, bounds=bounds)
    return normalise(scene) if normalised else scene
