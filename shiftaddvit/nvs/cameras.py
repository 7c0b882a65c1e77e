"""Pinhole cameras: rays, projection, pose checks. OpenCV axes, camera-to-world, pixels at integers (docs/nvs.md)."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shiftaddvit.errors import UserError


def check_pose(pose: Float[Tensor, "4 4"], name: str) -> None:
    """Raise `UserError` naming `name` unless the pose is finite and its rotation is orthonormal and right-handed (to 1e-3)."""
    if not torch.isfinite(pose).all():
        raise UserError(f"{name}: the pose has a value that is not a finite number")
    rotation = pose[:3, :3].double()
    determinant = torch.linalg.det(rotation).item()
    if abs(determinant) < 1e-6:
        raise UserError(f"{name}: the pose is singular (determinant {determinant:.3g}); a camera-to-world rotation has determinant 1")
    if determinant < 0:
        raise UserError(f"{name}: the pose mirrors the world (determinant {determinant:.3g}); a rotation has determinant 1")
    error = (rotation.T @ rotation - torch.eye(3, dtype=torch.float64, device=rotation.device)).abs().max().item()
    if error > 1e-3:
        raise UserError(f"{name}: the pose's three axes are not orthonormal (off by {error:.3g}); scale and shear are not allowed")


def invert_pose(pose: Float[Tensor, "*n 4 4"]) -> Float[Tensor, "*n 4 4"]:
    """World-to-camera from camera-to-world (rigid, so transposed, never solved)."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    position = -(rotation @ pose[..., :3, 3:])
    last = torch.zeros_like(pose[..., 3:, :])
    last[..., 3] = 1
    return torch.cat([torch.cat([rotation, position], dim=-1), last], dim=-2)


def pixel_grid(height: int, width: int, device: torch.device | str = "cpu") -> Float[Tensor, "HW 2"]:
    """(x, y) of every pixel in reading order."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def pixel_rays(
    pixels: Float[Tensor, "R 2"], intrinsics: Float[Tensor, "3 3"], pose: Float[Tensor, "4 4"]
) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
    """Origins and directions in the world. A direction has length 1 along the optical axis, so origin + t·direction has depth t."""
    focal = torch.stack([intrinsics[0, 0], intrinsics[1, 1]])
    centre = intrinsics[:2, 2]
    plane = (pixels - centre) / focal
    local = torch.cat([plane, torch.ones_like(plane[:, :1])], dim=-1)
    return pose[:3, 3].expand(len(pixels), 3), local @ pose[:3, :3].T


def project(
    points: Float[Tensor, "*n 3"], intrinsics: Float[Tensor, "V 3 3"], poses: Float[Tensor, "V 4 4"]
) -> tuple[Float[Tensor, "V *n 2"], Float[Tensor, "V *n"]]:
    """Pixel and depth of every point in every view. Depths near zero are clamped in the division, so pixels stay finite."""
    flat = points.reshape(-1, 3)
    to_camera = invert_pose(poses)
    local = flat @ to_camera[:, :3, :3].transpose(-1, -2) + to_camera[:, None, :3, 3]  # (V, n, 3)
    image = local @ intrinsics.transpose(-1, -2)
    pixels = (image[..., :2] / image[..., 2:].clamp_min(1e-8)).clamp(-1e6, 1e6)
    views, lead = len(poses), points.shape[:-1]
    return pixels.reshape(views, *lead, 2), local[..., 2].reshape(views, *lead)


def inside(
    pixels: Float[Tensor, "*n 2"], depth: Float[Tensor, "*n"], height: int, width: int
) -> Bool[Tensor, "*n"]:
    """Whether a projection lands between the outermost pixel centres and in front of the camera."""
    x, y = pixels.unbind(-1)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1) & (depth > 0)


def average_pose(poses: Float[Tensor, "N 4 4"]) -> Float[Tensor, "4 4"]:
    """Mean position, mean view direction, and the mean up made perpendicular to it."""
    forward = _unit(poses[:, :3, 2].sum(dim=0), "the views look in all directions: their mean view direction is zero")
    down = poses[:, :3, 1].sum(dim=0)
    right = _unit(torch.linalg.cross(down, forward), "the mean up direction is along the mean view direction")
    mean = torch.eye(4, dtype=poses.dtype, device=poses.device)
    mean[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, poses[:, :3, 3].mean(dim=0)], dim=-1)
    return mean


def _unit(vector: Float[Tensor, "3"], complaint: str) -> Float[Tensor, "3"]:
    length = vector.norm()
    if length < 1e-8:
        raise UserError(complaint)
    return vector / length


def nearest_views(pose: Float[Tensor, "4 4"], poses: Float[Tensor, "N 4 4"]) -> Int[Tensor, "N"]:
    """Indices of `poses` from the nearest camera position to the farthest; ties keep their order."""
    return (poses[:, :3, 3] - pose[:3, 3]).norm(dim=-1).argsort(stable=True)


def flip_yz(pose: Float[Tensor, "*n 4 4"]) -> Float[Tensor, "*n 4 4"]:
    """OpenGL axes (right, up, back) to OpenCV (right, down, forward) and back."""
    flipped = pose.clone()
    flipped[..., :3, 1:3] *= -1
    return flipped


def look_at(
    position: Float[np.ndarray, "3"], target: Float[np.ndarray, "3"], up: Float[np.ndarray, "3"]
) -> Float[Tensor, "4 4"]:
    """The pose at `position` that looks at `target` with `up` upwards in the picture."""
    forward = np.asarray(target, dtype=np.float64) - position
    length = np.linalg.norm(forward)
    if length < 1e-12:
        raise UserError("a camera cannot look at its own position")
    forward = forward / length
    right = np.cross(forward, up)
    if np.linalg.norm(right) < 1e-9:
        raise UserError("a camera cannot look straight along its up direction")
    right = right / np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, position], axis=-1)
    return torch.from_numpy(pose)
