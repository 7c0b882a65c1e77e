"""Patch embedding with torch's convolution."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def padded_side(kernel: int) -> int:
    """The side, in pixels, of a picture's window with its zeros: the power of two from `kernel` on."""
    return 1 << (kernel - 1).bit_length()


def unflatten_weight(weight: Float[Tensor, "out flat"], kernel: int, planes: bool) -> Float[Tensor, "out in kernel kernel"]:
    """The convolution's weight that `flatten_weight` was given."""
    if planes:
        side = padded_side(kernel)
        return weight.reshape(weight.shape[0], -1, side, side)[:, :, :kernel, side - kernel :]
    return weight.reshape(weight.shape[0], kernel, kernel, -1).permute(0, 3, 1, 2)


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    prefix: Tensor | None, position: Tensor | None, height: int, width: int, kernel: int, stride: int, padding: int, planes: bool,
) -> Tensor:  # fmt: skip
    """In float32, rounded once to the dtype of the weight. `weight` is flat, in the order that the layout of x needs."""
    n, wide = weight.shape[0], torch.float64 if weight.dtype == torch.float64 else torch.float32
    pictures = x.to(wide) if planes else x.to(wide).transpose(1, 2).reshape(x.shape[0], -1, height, width)
    filters = unflatten_weight(weight.to(wide), kernel, planes)
    y = F.conv2d(pictures, filters, bias.to(wide) if bias is not None else None, stride, padding).flatten(2).transpose(1, 2)
    if norm_weight is not None:
        y = F.layer_norm(y, (n,), norm_weight.to(wide), norm_bias.to(wide), eps)
    if prefix is not None:
        y = torch.cat([prefix.to(wide).expand(y.shape[0], -1, -1), y], dim=1)
    if position is not None:
        y = y + position
    return y.to(weight.dtype).contiguous()
