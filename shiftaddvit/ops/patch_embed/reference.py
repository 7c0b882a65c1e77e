"""Patch embedding with torch's convolution."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    prefix: Tensor | None, position: Tensor | None, height: int, width: int, kernel: int, stride: int, padding: int, planes: bool,
) -> Tensor:  # fmt: skip
    """In float32, rounded once to the dtype of the weight. `weight` is flat, in the order that the layout of x needs."""
    n, wide = weight.shape[0], torch.float64 if weight.dtype == torch.float64 else torch.float32
    if planes:
        pictures, filters = x.to(wide), weight.to(wide).reshape(n, x.shape[1], -1)
        side = math.isqrt(filters.shape[2])
        filters = filters.unflatten(2, (side, side))[:, :, :kernel, side - kernel :]
    else:
        pictures = x.to(wide).transpose(1, 2).reshape(x.shape[0], -1, height, width)
        filters = weight.to(wide).reshape(n, kernel, kernel, -1).permute(0, 3, 1, 2)
    y = F.conv2d(pictures, filters, bias.to(wide) if bias is not None else None, stride, padding).flatten(2).transpose(1, 2)
    if norm_weight is not None:
        y = F.layer_norm(y, (n,), norm_weight.to(wide), norm_bias.to(wide), eps)
    if prefix is not None:
        y = torch.cat([prefix.to(wide).expand(y.shape[0], -1, -1), y], dim=1)
    if position is not None:
        y = y + position
    return y.to(weight.dtype).contiguous()
