"""What the source views see at points in space (GNT, section 3; conventions of IBRNet)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .cameras import inside, project
from .sources import Sources


class Seen(NamedTuple):
    """What V views see at S points on each of R rays."""

    values: Float[Tensor, "R S V C"]
    """RGB, then features; zero outside the picture."""
    ray_diff: Float[Tensor, "R S V 4"]
    """Normalised difference of the directions to the target camera and to the source camera, and their dot product."""
    mask: Float[Tensor, "R S V 1"]
    """1 where the point is inside the picture and in front of the camera."""


def sample_depths(
    rays: int, samples: int, near: float, far: float, jitter: bool, device: torch.device | str
) -> Float[Tensor, "R S"]:
    """Depths from near to far, uniform in inverse depth; `jitter` moves each at random in its own interval (training)."""
    steps = torch.linspace(0, 1, samples, device=device)
    depths = 1 / ((1 / near) * (1 - steps) + (1 / far) * steps)
    return jittered(depths, rays, jitter)


def jittered(values: Float[Tensor, "S"], rays: int, jitter: bool) -> Float[Tensor, "R S"]:
    """Increasing values for every ray; with `jitter` each moves at random between the middles to its neighbours."""
    if not jitter:
        return values.expand(rays, -1)
    middle = 0.5 * (values[1:] + values[:-1])
    low, high = torch.cat([values[:1], middle]), torch.cat([middle, values[-1:]])
    return low + (high - low) * torch.rand(rays, len(values), device=values.device)


def look_up(points: Float[Tensor, "R S 3"], origin: Float[Tensor, "R 3"], sources: Sources) -> Seen:
    """Colours, features, relative directions and validity of every point in every source view. Bilinear, pixels at integers; float32."""
    with torch.autocast(points.device.type, enabled=False):
        pixels, depth = project(points, sources.intrinsics, sources.poses)  # (V, R, S, 2), (V, R, S)
        height, width = sources.images.shape[-2:]
        mask = inside(pixels, depth, height, width)
        grid = torch.stack([pixels[..., 0] * (2 / (width - 1)), pixels[..., 1] * (2 / (height - 1))], dim=-1) - 1
        values = F.grid_sample(sources.images, grid, align_corners=True)
        if sources.features is not None:
            values = torch.cat([values, F.grid_sample(sources.features.float(), grid, align_corners=True)], dim=1)
        return Seen(
            values.permute(2, 3, 0, 1),  # (V, C, R, S) → (R, S, V, C)
            _ray_diff(points, origin, sources.poses[:, :3, 3]),
            mask.permute(1, 2, 0).unsqueeze(-1).float(),
        )


def _ray_diff(
    points: Float[Tensor, "R S 3"], origin: Float[Tensor, "R 3"], centres: Float[Tensor, "V 3"]
) -> Float[Tensor, "R S V 4"]:
    to_target = (origin[:, None] - points).unsqueeze(2)
    to_target = to_target / (to_target.norm(dim=-1, keepdim=True) + 1e-6)
    to_source = centres - points.unsqueeze(2)
    to_source = to_source / (to_source.norm(dim=-1, keepdim=True) + 1e-6)
    difference = to_target - to_source
    direction = difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return torch.cat([direction, (to_target * to_source).sum(dim=-1, keepdim=True)], dim=-1)
