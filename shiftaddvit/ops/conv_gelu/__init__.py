"""Depthwise 3×3 convolution and GELU over tokens in raster order: the middle of PVTv2's MLP. For inference: no gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, overlapping, same_device
from . import reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def conv_gelu(
    h: Tensor,
    height: int,
    width: int,
    conv_weight: Float[Tensor, "9 C"],
    conv_bias: Float[Tensor, "C"],
    h_scale: Float[Tensor, "C"] | None = None,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "B N C"]:
    """GELU(conv3×3(h) + conv_bias) of tokens h (B, height · width, C) in raster order, zero outside the picture.

    `conv_weight[3·dy + dx, c]` is `conv.weight[c, 0, dy, dx]`; the result has its dtype. int8 h needs `h_scale`, the value of one unit in
    each channel. Sums and GELU are float32's, but of float16 on a GPU float16's: nine roundings of 2^-11, and the tanh's own. `pdl` overlaps the launch with the kernel before it, for chains in which every kernel is launched so.
    """
    if h.dim() != 3 or h.shape[1] != height * width:
        raise UserError(f"h must be (B, {height}·{width}, C), got {tuple(h.shape)}")
    if (h.dtype == torch.int8) != (h_scale is not None):
        raise UserError(f"h_scale goes with int8 h and only with it, h is {h.dtype}")
    channels = h.shape[-1]
    if conv_weight.shape != (9, channels) or conv_bias.shape != (channels,):
        raise UserError(f"conv_weight must be (9, {channels}) and conv_bias ({channels},), got {tuple(conv_weight.shape)} and {tuple(conv_bias.shape)}")
    if conv_weight.dtype not in _FLOATS or h.dtype not in (conv_weight.dtype, torch.int8):
        raise UserError(f"h and conv_weight must share one of float16, bfloat16, float32, got {h.dtype} and {conv_weight.dtype}")
    same_device(h=h, conv_weight=conv_weight, conv_bias=conv_bias, h_scale=h_scale)
    pdl = overlapping(pdl, conv_weight)
    return torch.ops.shiftaddvit.conv_gelu(h.contiguous(), height, width, conv_weight.contiguous(), conv_bias, h_scale, pdl, backend)


@torch.library.custom_op(
    "shiftaddvit::conv_gelu",
    mutates_args=(),
    schema="(Tensor h, int height, int width, Tensor conv_weight, Tensor conv_bias, Tensor? h_scale, bool pdl, str backend) -> Tensor",
)
def _conv_gelu(h, height, width, conv_weight, conv_bias, h_scale, pdl, backend):
    if choose_backend(backend, h) == "triton":
        from . import triton as kernels

        return kernels.conv_gelu(h, height, width, conv_weight, conv_bias, h_scale, pdl)
    return reference.conv_gelu(h, height, width, conv_weight, conv_bias, h_scale)


@_conv_gelu.register_fake
def _(h, height, width, conv_weight, conv_bias, h_scale, pdl, backend):
    return h.new_empty(h.shape, dtype=conv_weight.dtype)
