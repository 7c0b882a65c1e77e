"""The LLFF layout: `poses_bounds.npy` beside `images/` and, smaller, `images_2/`, `images_4/`, `images_8/`."""

import os
from pathlib import Path

import numpy as np
import torch

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .pictures import list_pictures, picture_size, read_pictures
from .scene import Scene, every_eighth, scale_intrinsics


def picture_folder(folder: Path, width: int | None) -> Path:
    """The folder with the smallest pictures that are at least `width` wide; without `width`, the largest pictures."""
    found = []
    for candidate in sorted(folder.glob("images*")):
        pictures = list_pictures(candidate) if candidate.is_dir() else []
        if pictures:
            found.append((picture_size(pictures[0])[1], candidate))
    if not found:
        raise UserError(f"{folder}: no pictures in images/ or images_2/, images_4/, images_8/")
    widths = sorted({size for size, _ in found})
    if width is None:
        return max(found)[1]
    enough = [item for item in found if item[0] >= width]
    if not enough:
        raise UserError(f"{folder}: width {width} asked, but the pictures have widths {widths}")
    return min(enough)[1]


def read_llff(folder: str | os.PathLike, width: int | None = None, step: int = 8) -> Scene:
    """A scene from an LLFF folder.

    Row i of `poses_bounds.npy` belongs to picture i sorted by name: a 3×5 matrix (down, right, back, position | height, width, focal) at
    full resolution, then near and far depth. The principal point is the middle of the picture.
    """
    folder = Path(folder)
    rows = _read_rows(folder / "poses_bounds.npy")
    pictures = list_pictures(picture_folder(folder, width))
    if len(pictures) != len(rows):
        raise UserError(
            f"{folder / 'poses_bounds.npy'}: {len(rows)} poses, but {pictures[0].parent} has {len(pictures)} pictures; one pose a picture is needed"
        )
    images, (height, full_width) = read_pictures(pictures, width)
    matrix = torch.from_numpy(rows[:, :15].reshape(-1, 3, 5).copy())
    size_height, size_width, focal = matrix[:, :, 4].unbind(-1)
    if (matrix[:, :, 4] <= 0).any():
        raise UserError(f"{folder / 'poses_bounds.npy'}: height, width and focal length must be positive")
    if (size_height / size_width - height / full_width).abs().max() > 0.01:
        raise UserError(
            f"{folder / 'poses_bounds.npy'}: speaks of {int(size_width[0])}×{int(size_height[0])} pictures, "
            f"but {pictures[0].name} has {full_width}×{height}; the shapes differ"
        )
    poses = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    poses[:, :3, 0], poses[:, :3, 1], poses[:, :3, 2] = matrix[:, :, 1], matrix[:, :, 0], -matrix[:, :, 2]
    poses[:, :3, 3] = matrix[:, :, 3]
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(len(rows), 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = (size_width - 1) / 2, (size_height - 1) / 2
    return Scene(
        name=folder.resolve().name,
        names=tuple(path.name for path in pictures),
        images=images,
        intrinsics=torch.stack(
            [
                scale_intrinsics(one, images.shape[2] / w.item(), images.shape[1] / h.item())
                for one, w, h in zip(intrinsics, size_width, size_height, strict=True)
            ]
        ),
        poses=poses,
        bounds=torch.from_numpy(rows[:, 15:17].copy()),
        test=every_eighth(len(rows), step),
        world=torch.eye(4, dtype=torch.float64),
    )


def _read_rows(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a NumPy array ({error})") from None
    if rows.ndim != 2 or rows.shape[1] != 17:
        raise UserError(f"{path}: shape {rows.shape}; allowed: (views, 17)")
    return rows.astype(np.float64)


def write_llff(folder: str | os.PathLike, scene: Scene) -> None:
    """Write `poses_bounds.npy` for a scene whose principal points are central and pixels square; pictures are not touched."""
    rows = []
    for name, matrix, pose, bound in zip(scene.names, scene.intrinsics, scene.poses, scene.bounds, strict=True):
        centre = torch.tensor([(scene.width - 1) / 2, (scene.height - 1) / 2], dtype=torch.float64)
        if (matrix[:2, 2] - centre).abs().max() > 0.51 or (matrix[0, 0] / matrix[1, 1] - 1).abs() > 1e-3:
            raise UserError(f"{name}: LLFF holds one focal length and a central principal point only; write transforms.json instead")
        focal = matrix[0, 0].item()
        axes = torch.stack([pose[:3, 1], pose[:3, 0], -pose[:3, 2], pose[:3, 3]], dim=-1)
        size = torch.tensor([[scene.height], [scene.width], [focal]], dtype=torch.float64)
        rows.append(torch.cat([torch.cat([axes, size], dim=-1).flatten(), bound]))
    with atomic_write(Path(folder) / "poses_bounds.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, torch.stack(rows).numpy())
