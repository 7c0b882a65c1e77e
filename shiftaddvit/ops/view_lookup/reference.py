"""The formula, with torch's own interpolation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def view_lookup(
    origin: Tensor, direction: Tensor, depths: Tensor, project: Tensor, centre: Tensor, images: Tensor, features: Tensor,
    color_weight: Tensor, feature_weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    views, height, width, _ = images.shape
    points = (origin[:, None] + depths[:, None] * direction[:, None]).flatten(0, 1)  # (RS, 3)
    image = torch.einsum("vij,nj->vni", project[..., :3], points) + project[:, None, :, 3]
    pixel = (image[..., :2] / image[..., 2:].clamp_min(1e-8)).clamp(-1e6, 1e6)
    x, y = pixel.unbind(-1)
    seen = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1) & (image[..., 2] > 0)
    grid = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], dim=-1).unsqueeze(1)  # (V, 1, RS, 2)
    color, feature = (_sample(planes, grid) for planes in (images, features))
    dtype = images.dtype
    hidden = color.to(dtype) @ color_weight.t() + feature.to(dtype) @ feature_weight.t()
    hidden = (hidden.float() + bias.float()).relu().to(dtype)
    out = ((hidden @ out_weight.t()).float() + out_bias.float()).to(dtype)
    geometry = torch.cat(
        [_relative(points, origin, centre, len(depths)), seen.unsqueeze(-1).float(), points.new_zeros(views, len(points), 3)], dim=-1
    )
    return out, geometry.to(dtype), out.amax(dim=0)


def _sample(planes: Tensor, grid: Tensor) -> Tensor:
    """Channels-last planes at normalised places: (V, RS, C), float32."""
    sampled = F.grid_sample(planes.permute(0, 3, 1, 2).float(), grid, align_corners=True)
    return sampled[:, :, 0].transpose(1, 2)


def _relative(points: Tensor, origin: Tensor, centre: Tensor, samples: int) -> Tensor:
    to_target = origin.repeat_interleave(samples, dim=0) - points
    to_target = to_target / (to_target.norm(dim=-1, keepdim=True) + 1e-6)
    to_source = centre[:, None] - points
    to_source = to_source / (to_source.norm(dim=-1, keepdim=True) + 1e-6)
    difference = to_target - to_source
    heading = difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return torch.cat([heading, (to_target * to_source).sum(dim=-1, keepdim=True)], dim=-1)
