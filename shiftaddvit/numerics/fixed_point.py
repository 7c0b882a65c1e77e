"""Fixed-point rounding of activations, as DeepShift does before a shift layer."""

import torch
from jaxtyping import Float
from torch import Tensor


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, integer_bits, fraction_bits):
        step, limit = 2.0**-fraction_bits, 2.0 ** (integer_bits - 1)
        # Half precision overflows at 2^16, so the rounding always happens in float32.
        rounded = torch.clamp(torch.floor(x.float() / step) * step, -limit, limit - step)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fixed_point(x: Float[Tensor, "*shape"], integer_bits: int = 16, fraction_bits: int = 16) -> Float[Tensor, "*shape"]:
    """clamp(⌊x·2^f⌋/2^f, −2^(i−1), 2^(i−1) − 2^−f) with an identity gradient; 16.16 as published. The dtype of `x` is kept."""
    return _FixedPoint.apply(x, integer_bits, fraction_bits)
