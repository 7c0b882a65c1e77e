"""Camera paths: the held-out views, a spiral, between the captured views, or the user's own from JSON."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from .cameras import average_pose, check_pose, flip_yz, look_at
from .scene import Camera, Scene, to_world
from .transforms_json import read_frames


def held_out(scene: Scene) -> list[Camera]:
    """The scene's test views."""
    if not scene.test:
        raise UserError(f"scene {scene.name!r} holds out no view; allowed paths: spiral, interpolated, a JSON file")
    return [scene.camera(index) for index in scene.test]


def spiral(scene: Scene, frames: int = 60, turns: int = 2, zoom: float = 0.5) -> list[Camera]:
    """A spiral about the mean camera, within the 90th percentile of the captured positions, looking at the depth where most is seen.

    `zoom` is how far it also moves along the view, relative to that percentile.
    """
    _check_frames(frames)
    mean = average_pose(scene.poses)
    local = scene.poses[:, :3, 3] - mean[:3, 3]
    reach = torch.quantile((local @ mean[:3, :3]).abs(), 0.9, dim=0)
    near, far = scene.bounds[:, 0].min().item(), scene.bounds[:, 1].max().item()
    focus = 1 / (0.25 / near + 0.75 / far) if far < 100 * near else 2 * near
    target = (mean[:3, 3] + focus * mean[:3, 2]).numpy()
    up = (-mean[:3, 1]).numpy()
    cameras = []
    for frame in range(frames):
        angle = 2 * math.pi * turns * frame / frames
        offset = torch.tensor([math.cos(angle), -math.sin(angle), -math.sin(angle / turns) * zoom], dtype=torch.float64) * reach
        position = (mean[:3, 3] + mean[:3, :3] @ offset).numpy()
        cameras.append(_camera(scene, look_at(position, target, up)))
    return cameras


def interpolated(scene: Scene, frames: int = 60) -> list[Camera]:
    """A smooth way past the captured views in their order: positions by Catmull-Rom splines, rotations by slerp."""
    _check_frames(frames)
    poses = scene.poses
    stops = np.linspace(0, len(poses) - 1, frames)
    cameras = []
    for stop in stops:
        first = min(int(stop), len(poses) - 2)
        share = float(stop) - first
        window = [poses[max(0, min(len(poses) - 1, first + step)), :3, 3] for step in (-1, 0, 1, 2)]
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = slerp(poses[first, :3, :3], poses[first + 1, :3, :3], share)
        pose[:3, 3] = _catmull_rom(window, share)
        cameras.append(_camera(scene, pose))
    return cameras


def slerp(first: Float[Tensor, "3 3"], second: Float[Tensor, "3 3"], share: float) -> Float[Tensor, "3 3"]:
    """The rotation `share` of the way from the first to the second, about one axis."""
    turn = first.T @ second
    cosine = ((turn.diagonal().sum() - 1) / 2).clamp(-1, 1)
    angle = torch.acos(cosine).item()
    if angle < 1e-9:
        return first.clone()
    if math.pi - angle < 1e-6:
        raise UserError("two neighbouring views look in opposite directions: there is no one way between them")
    axis = torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / (2 * math.sin(angle))
    cross = torch.zeros(3, 3, dtype=turn.dtype)
    cross[0, 1], cross[0, 2], cross[1, 2] = -axis[2], axis[1], -axis[0]
    cross = cross - cross.T
    part = angle * share
    return first @ (torch.eye(3, dtype=turn.dtype) + math.sin(part) * cross + (1 - math.cos(part)) * (cross @ cross))


def _catmull_rom(points: list[Float[Tensor, "3"]], share: float) -> Float[Tensor, "3"]:
    a, b, c, d = points
    return 0.5 * (2 * b + (c - a) * share + (2 * a - 5 * b + 4 * c - d) * share**2 + (3 * b - a - 3 * c + d) * share**3)


def read_path(path: str | os.PathLike, scene: Scene) -> list[Camera]:
    """A user's path: JSON `{"frames": [{"transform_matrix": 4×4, "fl_x"?: pixels, "w"?, "h"?}, …]}` in the coordinates and axes of
    transforms.json (right, up, back), or with `"convention": "opencv"` (right, down, forward), in the scene file's world.

    The size is that of the scene's pictures unless a frame says `w` and `h`. UserError names the frame that is wrong.
    """
    path = Path(path)
    data, frames = read_frames(path)
    convention = data.get("convention", "opengl")
    if convention not in ("opengl", "opencv"):
        raise UserError(f"{path}: 'convention' is {convention!r}; allowed: 'opengl' (right, up, back), 'opencv' (right, down, forward)")
    return [_read_frame(f"{path}: frames[{number}]", frame, convention, scene) for number, frame in enumerate(frames)]


def _read_frame(name: str, frame: dict, convention: str, scene: Scene) -> Camera:
    try:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{name} needs a 'transform_matrix' of 4×4 numbers") from None
    if pose.shape != (4, 4):
        raise UserError(f"{name}: 'transform_matrix' has shape {tuple(pose.shape)}; allowed: 4×4")
    check_pose(pose, name)
    numbers = {key: frame.get(key) for key in ("fl_x", "w", "h")}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise UserError(f"{name}: '{key}' must be a positive number, got {value!r}")
    height, width = int(numbers["h"] or scene.height), int(numbers["w"] or scene.width)
    intrinsics = scene.intrinsics.mean(dim=0)
    intrinsics[:2] *= numbers["fl_x"] / intrinsics[0, 0] if numbers["fl_x"] else width / scene.width
    intrinsics[0, 2], intrinsics[1, 2] = (width - 1) / 2, (height - 1) / 2
    pose = flip_yz(pose) if convention == "opengl" else pose
    return Camera(intrinsics, to_world(pose, scene.world), height, width)


def _camera(scene: Scene, pose: Float[Tensor, "4 4"]) -> Camera:
    return Camera(scene.intrinsics.mean(dim=0), pose, scene.height, scene.width)


def _check_frames(frames: int) -> None:
    if frames < 1:
        raise UserError(f"frames = {frames}; allowed: 1 and more")
