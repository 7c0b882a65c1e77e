"""The depthwise convolution and GELU with torch's own operations, in float32 or float64, rounded once at the end."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def conv_gelu(
    h: Tensor, height: int, width: int, conv_weight: Float[Tensor, "9 C"], conv_bias: Float[Tensor, "C"], h_scale: Float[Tensor, "C"] | None
) -> Float[Tensor, "B N C"]:
    """GELU(conv3×3(h · h_scale) + conv_bias)."""
    a = h if h.dtype == torch.float64 else h.float()
    a = a if h_scale is None else a * h_scale
    channels = a.shape[2]
    pictures = a.transpose(1, 2).unflatten(2, (height, width))
    filters = conv_weight.to(a.dtype).t().reshape(channels, 1, 3, 3)
    y = F.conv2d(pictures, filters, conv_bias.to(a.dtype), padding=1, groups=channels)
    return F.gelu(y.flatten(2).transpose(1, 2)).to(conv_weight.dtype).contiguous()
