"""What a scene is like before anyone trains on it: how the cameras stand, what they share, whether they face one way."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from .cameras import (
    average_pose,
    inside,
    invert_pose,
    nearest_views,
    pixel_grid,
    pixel_rays,
    project,
)
from .scene import Scene

FACING = 45.0  # degrees from the mean direction that still count as forward-facing


@dataclass(frozen=True)
class Inspection:
    """Numbers about a scene."""

    views: int
    """Pictures with a pose."""
    width: int
    """Of the pictures, in pixels."""
    height: int
    """Of the pictures, in pixels."""
    test: int
    """Views held out."""
    field_of_view: float
    """Horizontal, in degrees."""
    near: float
    """Smallest near bound, in the file's units."""
    far: float
    """Largest far bound, in the file's units."""
    spread: float
    """Largest distance of a camera from the mean position, over the near bound: below 0.05 there is little parallax to learn from."""
    turn: float
    """Largest angle between a view's direction and the mean one, in degrees."""
    overlap: float
    """Share of a view's pixels, at middle depth, that at least three other views see (all others, where there are fewer)."""
    forward_facing: bool
    """Whether NDC and the spiral path suit the scene: all views turn less than 45° and no camera stands beyond the near bound."""
    dropped: tuple[str, ...]
    """Pictures in the folder without a pose."""

    @property
    def advice(self) -> str:
        """One sentence."""
        if self.spread < 0.05:
            return "the cameras stand almost at one point: move sideways between photos, not only turn"
        if self.overlap < 0.5:
            return "the views share little: take photos closer together"
        if not self.forward_facing:
            return "the views look in different directions: use an interpolated path rather than a spiral, and NeRF without NDC"
        return "forward-facing, with enough overlap: good for GNT and for NeRF in NDC"


def inspect_scene(scene: Scene) -> Inspection:
    """Measure a scene, normalised or not."""
    mean = average_pose(scene.poses)
    cosine = (scene.poses[:, :3, 2] @ mean[:3, 2]).clamp(-1, 1)
    turn = math.degrees(torch.acos(cosine).max().item())
    near, far = scene.bounds[:, 0].min().item(), scene.bounds[:, 1].max().item()
    along = ((scene.poses[:, :3, 3] - mean[:3, 3]) @ mean[:3, 2]).abs().max().item()
    return Inspection(
        views=len(scene),
        width=scene.width,
        height=scene.height,
        test=len(scene.test),
        field_of_view=math.degrees(2 * math.atan(0.5 * scene.width / scene.intrinsics[:, 0, 0].mean().item())),
        near=near / scene.unit,
        far=far / scene.unit,
        spread=scene.spread / near,
        turn=turn,
        overlap=_overlap(scene),
        forward_facing=turn < FACING and along < near,
        dropped=scene.dropped,
    )


def _overlap(scene: Scene) -> float:
    grid = pixel_grid(9, 12).double() * torch.tensor([(scene.width - 1) / 11, (scene.height - 1) / 8])
    shares = []
    for view in range(len(scene)):
        near, far = scene.bounds[view].tolist()
        origin, direction = pixel_rays(grid, scene.intrinsics[view], scene.poses[view])
        points = origin + 2 / (1 / near + 1 / far) * direction
        others = nearest_views(scene.poses[view], scene.poses)[1:]
        pixels, depth = project(points, scene.intrinsics[others], scene.poses[others])
        seen = inside(pixels, depth, scene.height, scene.width).sum(dim=0)
        shares.append((seen >= min(3, len(others))).float().mean().item())
    return sum(shares) / len(shares)


def cameras_picture(scene: Scene, size: int = 480) -> UInt8[Tensor, "S 2S 3"]:
    """The cameras from above (left) and from behind (right), as seen from the mean camera; held-out ones in red."""
    to_mean = invert_pose(average_pose(scene.poses))
    local = to_mean @ scene.poses  # right, down, forward of the mean camera
    # The frame covers the cameras and the nearest things they see.
    reach = 1.15 * max(local[:, :3, 3].abs().max().item(), scene.bounds[:, 0].min().item() * 0.6)
    canvas = Image.new("RGB", (2 * size, size), "white")
    draw = ImageDraw.Draw(canvas)
    held = set(scene.test)
    length = 0.18 * reach
    for panel, (across, upwards, sign) in enumerate(((0, 2, -1.0), (0, 1, 1.0))):
        middle = torch.tensor([size * (panel + 0.5), size / 2], dtype=torch.float64)
        for view, pose in enumerate(local):
            color = (200, 40, 40) if view in held else (40, 80, 170)
            corners = _frustum(scene, view, pose, length)
            flat = corners[:, [across, upwards]] * torch.tensor([1.0, sign]) * (size / (2 * reach)) + middle
            apex, *rim = [tuple(point.tolist()) for point in flat]
            for corner, following in zip(rim, [*rim[1:], rim[0]], strict=True):
                draw.line([apex, corner], fill=color)
                draw.line([corner, following], fill=color)
            draw.ellipse([apex[0] - 3, apex[1] - 3, apex[0] + 3, apex[1] + 3], fill=color)
        draw.text((size * panel + 8, 8), ("from above, looking up the page", "from behind")[panel], fill="black")
    draw.line([(size, 0), (size, size)], fill=(200, 200, 200))
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).reshape(size, 2 * size, 3)


def _frustum(scene: Scene, view: int, pose: Tensor, length: float) -> Tensor:
    """The camera's position and the four corners of its picture at `length`."""
    right, bottom = scene.width - 1, scene.height - 1
    corners = torch.tensor([[0, 0], [right, 0], [right, bottom], [0, bottom]], dtype=torch.float64)
    origin, direction = pixel_rays(corners, scene.intrinsics[view], pose)
    return torch.cat([origin[:1], origin + length * direction])
