"""A captured scene in memory: pictures, cameras, bounds, and which views are held out."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from shiftaddvit.errors import UserError

from .cameras import average_pose, check_pose, invert_pose

# Rays are sampled from so much of the smallest near bound to so much of the largest far bound.
NEAR_MARGIN, FAR_MARGIN = 0.9, 1.6


class Camera(NamedTuple):
    """One view to look through."""

    intrinsics: Float[Tensor, "3 3"]
    """In pixels, pixel centres at integers."""
    pose: Float[Tensor, "4 4"]
    """Camera-to-world, OpenCV axes."""
    height: int
    """Of the picture, in pixels."""
    width: int
    """Of the picture, in pixels."""


@dataclass(frozen=True)
class Scene:
    """Pictures of one size with their cameras, sorted by name. Geometry is float64 here and becomes float32 on the device."""

    name: str
    """Of the scene, for tables and files."""
    names: tuple[str, ...]
    """One file name a view."""
    images: UInt8[Tensor, "N H W 3"]
    """RGB."""
    intrinsics: Float[Tensor, "N 3 3"]
    """In pixels of `images`, pixel centres at integers."""
    poses: Float[Tensor, "N 4 4"]
    """Camera-to-world, OpenCV axes."""
    bounds: Float[Tensor, "N 2"]
    """Near and far depth of what each view sees, in world units."""
    test: tuple[int, ...]
    """Indices of the views held out; all others train."""
    world: Float[Tensor, "4 4"]
    """Similarity from the scene file's world to this one: the identity until `normalise`."""
    dropped: tuple[str, ...] = ()
    """Pictures in the folder that have no pose."""

    def __post_init__(self) -> None:
        count = len(self.names)
        if count < 2:
            raise UserError(f"scene {self.name!r} has {count} view{'s' * (count != 1)}; view synthesis needs at least 2, from different places")
        for field in ("images", "intrinsics", "poses", "bounds"):
            if len(getattr(self, field)) != count:
                raise UserError(f"scene {self.name!r} has {count} pictures but {len(getattr(self, field))} {field}; one each is needed")
        for name, pose, bound, matrix in zip(self.names, self.poses, self.bounds, self.intrinsics, strict=True):
            check_pose(pose, name)
            near, far = bound.tolist()
            if not 0 < near < far < float("inf"):
                raise UserError(f"{name}: bounds near {near:.6g}, far {far:.6g}; 0 < near < far is needed")
            if not (torch.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0):
                raise UserError(f"{name}: the focal length must be positive, got {matrix[0, 0]:.6g}, {matrix[1, 1]:.6g}")
        if self.spread < 1e-6 * self.bounds.max().item():
            raise UserError(f"scene {self.name!r}: all {count} cameras stand at the same point; move the camera between photos")
        if not set(self.test) <= set(range(count)) or len(self.test) >= count:
            raise UserError(f"scene {self.name!r}: test views {self.test} of {count}; allowed: indices below {count}, at least one view left to train")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    @property
    def train(self) -> tuple[int, ...]:
        held = set(self.test)
        return tuple(index for index in range(len(self)) if index not in held)

    @property
    def spread(self) -> float:
        """Largest distance of a camera from the mean position, in world units."""
        positions = self.poses[:, :3, 3]
        return (positions - positions.mean(dim=0)).norm(dim=-1).max().item()

    @property
    def depth_range(self) -> tuple[float, float]:
        """Where rays are sampled: 0.9 of the smallest near bound to 1.6 of the largest far bound."""
        return NEAR_MARGIN * self.bounds[:, 0].min().item(), FAR_MARGIN * self.bounds[:, 1].max().item()

    @property
    def unit(self) -> float:
        """World units of this scene in one unit of the scene file."""
        return torch.linalg.det(self.world[:3, :3]).abs().item() ** (1 / 3)

    def camera(self, index: int) -> Camera:
        return Camera(self.intrinsics[index], self.poses[index], self.height, self.width)


def every_eighth(count: int, step: int = 8) -> tuple[int, ...]:
    """The usual LLFF test views: 0, 8, 16, …; `step` 0 holds out none."""
    if step == 1 or step < 0:
        raise UserError(f"hold-out step {step}: allowed 0 (none held out) or 2 and more")
    return tuple(range(0, count, step)) if step else ()


def normalise(scene: Scene, nearest: float = 1 / 0.75) -> Scene:
    """The scene with its mean camera at the origin, y up, looking along −z, scaled so that the smallest near bound is `nearest`.

    The frame of the published LLFF loaders: bounds scaled by 1/(0.75·min), poses recentred.
    """
    scale = nearest / scene.bounds[:, 0].min().item()
    mean = average_pose(scene.poses)
    mean[:3, 1:3] *= -1  # right, up, back
    rigid = invert_pose(mean)
    poses = rigid @ scene.poses
    poses[:, :3, 3] *= scale
    similarity = torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=rigid.dtype)) @ rigid
    return replace(scene, poses=poses, bounds=scene.bounds * scale, world=similarity @ scene.world)


def to_world(pose: Float[Tensor, "4 4"], similarity: Float[Tensor, "4 4"]) -> Float[Tensor, "4 4"]:
    """A camera-to-world pose moved by a similarity; its rotation stays a rotation."""
    scale = torch.linalg.det(similarity[:3, :3]).abs() ** (1 / 3)
    moved = similarity @ pose
    moved[:3, :3] = moved[:3, :3] / scale
    return moved


def scale_intrinsics(intrinsics: Float[Tensor, "*n 3 3"], x: float, y: float) -> Float[Tensor, "*n 3 3"]:
    """Intrinsics of a picture resized by the factors x and y; half-pixel borders are kept, so (c + ½) scales."""
    scaled = intrinsics.clone()
    scaled[..., 0, :] *= x
    scaled[..., 1, :] *= y
    scaled[..., 0, 2] += 0.5 * x - 0.5
    scaled[..., 1, 2] += 0.5 * y - 0.5
    return scaled


def take(scene: Scene, keep: tuple[int, ...]) -> Scene:
    """The scene with only the views `keep`, in that order."""
    chosen = list(keep)
    held = set(scene.test)
    return replace(
        scene,
        names=tuple(scene.names[index] for index in keep),
        images=scene.images[chosen],
        intrinsics=scene.intrinsics[chosen],
        poses=scene.poses[chosen],
        bounds=scene.bounds[chosen],
        test=tuple(place for place, index in enumerate(keep) if index in held),
    )


def check_sources(scene: Scene, sources: int) -> None:
    """Raise `UserError` unless the scene has enough training views to serve `sources` of them to any view."""
    available = len(scene.train)
    if not 1 <= sources <= available:
        raise UserError(f"scene {scene.name!r} has {available} training views but {sources} sources were asked; allowed: 1 to {available}")
