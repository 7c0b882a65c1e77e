"""Weights that are zero or a signed power of two, and their straight-through gradients (DeepShift; ShiftAddViT section 4.2).

A weight is `sign · 2^(p + offset)`: `p` is an integer in the range that the bits allow and `offset` an optional integer per output
channel, so that a channel whose weights are larger than one, or all tiny, keeps its precision. Either way a multiplication is one shift.

Everything is computed on the bits of the float, so the values are exact on every device.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rounding = Literal["log", "value"]

_MANTISSA = (1 << 23) - 1
# The first mantissa that rounds up: √2 when rounding the logarithm, 1.5 when rounding to the nearest value.
_ROUND_UP_FROM = {"log": 0x3504F4, "value": 0x400000}
# Offsets that keep every exponent, of 6 bits even, within float32's normal numbers.
_OFFSETS = (-96, 127)
# How far the two rounding points lie apart, in log2 units: PS rounds s + this.
_LOG_SHIFT = {"log": 0.0, "value": 0.5 - 0.5849625007211562}


def exponent_range(bits: int, published_q: bool = False) -> tuple[int, int]:
    """Lowest and highest exponent of a `bits`-bit code: one bit of sign, one state for zero, the rest exponents up to 0.

    5 bits give [−14, 0], 4 bits [−6, 0]. DeepShift-Q as published uses one exponent more ([−15, 0] at 5 bits), which together with
    zero does not fit its bits.
    """
    if not 2 <= bits <= 6:
        raise ValueError(f"bits must be from 2 to 6, got {bits}")
    return -(2 ** (bits - 1) - (1 if published_q else 2)), 0


def power_of_two(exponent: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """2^exponent as float32, exactly, for exponents in [−126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def nearest_exponent(magnitude: Float[Tensor, "*shape"], rounding: Rounding = "log") -> Int[Tensor, "*shape"]:
    """The integer p with 2^p nearest to `magnitude`, in the logarithm or in value. Zero gives −127."""
    bits = magnitude.detach().to(torch.float32).abs().view(torch.int32)
    return (bits >> 23) - 127 + ((bits & _MANTISSA) >= _ROUND_UP_FROM[rounding]).to(torch.int32)


class _QuantizePS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shift, sign, low, high, log_shift, offset):
        broken = torch.isnan(shift) | torch.isnan(sign)
        exponent = torch.round(torch.clamp(torch.nan_to_num(shift.float()) + log_shift, low, high)).to(torch.int32)
        direction = torch.sign(torch.round(torch.clamp(sign.float(), -1, 1)))
        if offset is not None:
            exponent = exponent + offset
        weight = torch.where(broken, torch.nan, power_of_two(exponent) * direction)
        ctx.save_for_backward(weight)
        ctx.dtypes = shift.dtype, sign.dtype
        return weight

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        shift_dtype, sign_dtype = ctx.dtypes
        return (grad * weight * 0.6931471805599453).to(shift_dtype), grad.to(sign_dtype), None, None, None, None


def quantize_ps(
    shift: Float[Tensor, "out in"],
    sign: Float[Tensor, "out in"],
    bits: int = 5,
    rounding: Rounding = "log",
    offset: Int[Tensor, "out 1"] | None = None,
) -> Float[Tensor, "out in"]:
    """DeepShift-PS: W = 2^(round(clamp(s)) + offset) · sign(round(clamp(g, −1, 1))), zero where |g| ≤ ½.

    Gradients: ∂L/∂s = G·W·ln 2 and ∂L/∂g = G, both straight through the clamps. `shift` counts from the channel's offset.
    """
    low, high = exponent_range(bits)
    return _QuantizePS.apply(shift, sign, low, high, _LOG_SHIFT[rounding], offset)


class _QuantizeQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, low, high, rounding, offset):
        value = weight.float()
        if offset is not None:
            low, high = low + offset, high + offset
            exponent = torch.minimum(torch.maximum(nearest_exponent(value, rounding), low), high)
        else:
            exponent = torch.clamp(nearest_exponent(value, rounding), low, high)
        quantized = power_of_two(exponent) * torch.sign(value)
        return torch.where(torch.isnan(value), torch.nan, quantized)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None, None


def quantize_q(
    weight: Float[Tensor, "out in"],
    bits: int = 5,
    rounding: Rounding = "log",
    offset: Int[Tensor, "out 1"] | None = None,
    published_range: bool = False,
) -> Float[Tensor, "out in"]:
    """DeepShift-Q: W = sign(w)·2^round(log2 |w|), |w| clamped to the range; zeros stay zero; the gradient passes straight through."""
    low, high = exponent_range(bits, published_range)
    return _QuantizeQ.apply(weight, low, high, rounding, offset)


def channel_offset(weight: Float[Tensor, "out in"], rounding: Rounding = "log") -> Int[Tensor, "out 1"]:
    """The per-channel exponent offset that puts each row's largest weight at exponent 0 (0 for a row of zeros).

    A row that decayed below 2^−96, as dead channels of pre-trained models do, gets −96: its weights are then the smallest codes there."""
    largest = weight.detach().abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, nearest_exponent(largest, rounding).clamp(*_OFFSETS), 0).to(torch.int32)
