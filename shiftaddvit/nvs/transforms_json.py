"""transforms.json: one JSON file naming the pictures with their cameras (instant-ngp, nerfstudio, Blender)."""

import json
import math
import os
from pathlib import Path

import torch

from shiftaddvit.errors import UserError
from shiftaddvit.files import write_json

from .cameras import flip_yz
from .pictures import list_pictures, read_pictures, undistort
from .scene import Scene, every_eighth, scale_intrinsics

_LENS = ("k1", "k2", "p1", "p2")
_UNKNOWN_LENS = ("k3", "k4", "k5", "k6")


def read_transforms(
    folder: str | os.PathLike,
    width: int | None = None,
    step: int = 8,
    near: float | None = None,
    far: float | None = None,
    file: str = "transforms.json",
) -> Scene:
    """A scene from `folder/transforms.json`. Poses there have OpenGL axes; principal points count from the picture's corner.

    Bounds are the keys `near` and `far`, for each frame or for all; the arguments fill in where the file has none. Lists
    `train_filenames` and `test_filenames`, if there, are the split.
    """
    path = Path(folder) / file
    data, frames = read_frames(path)
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise UserError(f"{path}: frames[{number}] has no 'file_path'")
    frames = sorted(frames, key=lambda frame: frame["file_path"])
    listed = [frame["file_path"] for frame in frames]
    for name, following in zip(listed, listed[1:], strict=False):
        if name == following:
            raise UserError(f"{path}: two poses for {name}; one pose a picture is needed")
    pictures = [_picture(path, name) for name in listed]
    images, (height, full_width) = read_pictures(pictures, width)
    merged = [{key: value for key, value in data.items() if key != "frames"} | frame for frame in frames]
    poses = torch.stack([_pose(path, frame) for frame in merged])
    full = torch.stack([_intrinsics(path, frame, height, full_width) for frame in merged])
    scaled = scale_intrinsics(full, images.shape[2] / full_width, images.shape[1] / height)
    lenses = [tuple(_number(path, frame, key, 0.0) for key in _LENS) for frame in merged]
    for index, lens in enumerate(lenses):
        if any(_number(path, merged[index], key, 0.0) for key in _UNKNOWN_LENS):
            raise UserError(f"{path}: {listed[index]} has a lens model beyond k1, k2, p1, p2; undistort the pictures first")
        if any(lens):
            images[index] = undistort(images[index : index + 1], scaled[index], lens)[0]
    bounds = [(_bound(path, frame, "near", near), _bound(path, frame, "far", far)) for frame in merged]
    known = {picture.resolve() for picture in pictures}
    beside = [each for folder in sorted({picture.parent for picture in pictures}) for each in list_pictures(folder)]
    return Scene(
        name=path.resolve().parent.name,
        names=tuple(listed),
        images=images,
        intrinsics=scaled,
        poses=flip_yz(poses),
        bounds=torch.tensor(bounds, dtype=torch.float64),
        test=_split(path, data, listed, step),
        world=torch.eye(4, dtype=torch.float64),
        dropped=tuple(each.name for each in beside if each.resolve() not in known),
    )


def read_frames(path: Path) -> tuple[dict, list]:
    """A JSON object and its list `frames`; UserError where it is not JSON or has none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path}: 'frames' must be a list with one entry a picture")
    return data, frames


def write_transforms(folder: str | os.PathLike, scene: Scene, pictures: str = "images") -> None:
    """Write `transforms.json` for pictures that lie in `folder/pictures/` at the scene's size; pictures are not touched."""
    frames = []
    poses = flip_yz(scene.poses)
    for index, name in enumerate(scene.names):
        matrix = scene.intrinsics[index]
        near, far = scene.bounds[index].tolist()
        frames.append(
            {
                "file_path": _prefixed(pictures, name),
                "fl_x": matrix[0, 0].item(),
                "fl_y": matrix[1, 1].item(),
                "cx": matrix[0, 2].item() + 0.5,
                "cy": matrix[1, 2].item() + 0.5,
                "near": near,
                "far": far,
                "transform_matrix": poses[index].tolist(),
            }
        )
    held = set(scene.test)
    write_json(
        Path(folder) / "transforms.json",
        {
            "camera_model": "PINHOLE",
            "w": scene.width,
            "h": scene.height,
            "train_filenames": [frame["file_path"] for index, frame in enumerate(frames) if index not in held],
            "test_filenames": [frame["file_path"] for index, frame in enumerate(frames) if index in held],
            "frames": frames,
        },
    )


def _prefixed(folder: str, name: str) -> str:
    return name if name.startswith(f"{folder}/") else f"{folder}/{name}"


def _picture(path: Path, name: str) -> Path:
    """The file of a frame; Blender's files leave the suffix out."""
    picture = path.parent / name
    candidates = [picture] if picture.suffix else [picture.with_name(picture.name + suffix) for suffix in (".png", ".jpg", ".jpeg")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: there is a pose for {name}, but no such picture")


def _pose(path: Path, frame: dict) -> torch.Tensor:
    try:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except KeyError:
        raise UserError(f"{path}: {frame['file_path']} has no 'transform_matrix'") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: 'transform_matrix' of {frame['file_path']} must be 4×4 numbers") from None
    if pose.shape == (3, 4):
        pose = torch.cat([pose, torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)])
    if pose.shape != (4, 4):
        raise UserError(f"{path}: 'transform_matrix' of {frame['file_path']} has shape {tuple(pose.shape)}; allowed: 4×4")
    return pose


def _intrinsics(path: Path, frame: dict, height: int, width: int) -> torch.Tensor:
    for key, size in (("w", width), ("h", height)):
        stated = _number(path, frame, key, size)
        if stated != size:
            raise UserError(f"{path}: '{key}' says {stated:g}, but {frame['file_path']} has {size}")
    if "fl_x" in frame:
        fx = _number(path, frame, "fl_x")
        fy = _number(path, frame, "fl_y", fx)
    elif "camera_angle_x" in frame:
        fx = fy = 0.5 * width / math.tan(0.5 * _number(path, frame, "camera_angle_x"))
    else:
        raise UserError(f"{path}: {frame['file_path']} has neither 'fl_x' nor 'camera_angle_x', so its focal length is unknown")
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1] = fx, fy
    matrix[0, 2] = _number(path, frame, "cx", width / 2) - 0.5
    matrix[1, 2] = _number(path, frame, "cy", height / 2) - 0.5
    return matrix


def _number(path: Path, frame: dict, key: str, default: float | None = None) -> float:
    value = frame.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: '{key}' of {frame['file_path']} must be a number, got {value!r}")
    return float(value)


def _bound(path: Path, frame: dict, key: str, given: float | None) -> float:
    if key not in frame and given is None:
        raise UserError(f"{path}: no '{key}' depth for {frame['file_path']}; add 'near' and 'far' to the file or give --near and --far")
    return _number(path, frame, key, given)


def _split(path: Path, data: dict, listed: list[str], step: int) -> tuple[int, ...]:
    if "test_filenames" not in data:
        return every_eighth(len(listed), step)
    place = {name: index for index, name in enumerate(listed)}
    for name in data["test_filenames"]:
        if name not in place:
            raise UserError(f"{path}: 'test_filenames' names {name}, which has no frame")
    return tuple(sorted(place[name] for name in data["test_filenames"]))
