"""A scene that can be computed exactly: a textured wall with a textured square before it."""

from pathlib import Path

import numpy as np
import torch

from shiftaddvit.nvs.cameras import look_at, pixel_grid, pixel_rays
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.scene import Scene
from shiftaddvit.nvs.transforms_json import write_transforms

WALL, SQUARE = 4.0, 2.5  # depths along +z


def make_scene(views: int = 6, width: int = 32, height: int = 24, test: tuple[int, ...] = (0,), spread: float = 0.4) -> Scene:
    """Cameras near the origin looking along +z, on a jittered circle."""
    random = np.random.default_rng(0)
    images, poses, depths = [], [], []
    intrinsics = torch.tensor([[width * 0.9, 0, width / 2 - 0.5], [0, width * 0.9, height / 2 - 0.5], [0, 0, 1]], dtype=torch.float64)
    for view in range(views):
        angle = 2 * np.pi * view / views
        position = spread * np.array([np.cos(angle), np.sin(angle), 0.1 * random.standard_normal()])
        pose = look_at(position, np.array([0.0, 0.0, WALL]) + 0.1 * random.standard_normal(3), np.array([0.0, -1.0, 0.0]))
        color, depth = render(intrinsics, pose, height, width)
        images.append((color * 255).round().to(torch.uint8))
        poses.append(pose)
        depths.append(depth)
    bounds = torch.tensor([[depth.min() * 0.9, depth.max() * 1.1] for depth in depths], dtype=torch.float64)
    return Scene(
        name="synthetic",
        names=tuple(f"view{view:02d}.png" for view in range(views)),
        images=torch.stack(images),
        intrinsics=intrinsics.repeat(views, 1, 1),
        poses=torch.stack(poses),
        bounds=bounds,
        test=test,
        world=torch.eye(4, dtype=torch.float64),
    )


def render(intrinsics: torch.Tensor, pose: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour (H, W, 3) in [0, 1] and depth along the optical axis (H, W)."""
    origin, direction = pixel_rays(pixel_grid(height, width).double(), intrinsics, pose)
    wall = (WALL - origin[:, 2]) / direction[:, 2]
    square = (SQUARE - origin[:, 2]) / direction[:, 2]
    on_wall, on_square = origin + wall[:, None] * direction, origin + square[:, None] * direction
    hit = (on_square[:, :2].abs() < 0.35).all(dim=-1)
    color = torch.where(hit[:, None], _texture(on_square, 9.0), _texture(on_wall, 2.5))
    return color.reshape(height, width, 3), torch.where(hit, square, wall).reshape(height, width)


def _texture(point: torch.Tensor, frequency: float) -> torch.Tensor:
    x, y = point[:, 0] * frequency, point[:, 1] * frequency
    waves = torch.stack([torch.sin(x + 0.5 * y), torch.sin(1.3 * y - 0.7 * x + 1), torch.sin(0.8 * x) * torch.cos(0.9 * y)], dim=-1)
    return 0.5 + 0.4 * waves


def write_scene(scene: Scene, folder: Path) -> Path:
    """The scene as people have it: pictures and a transforms.json."""
    for name, image in zip(scene.names, scene.images, strict=True):
        write_png(folder / "images" / name, image)
    write_transforms(folder, scene)
    return folder
