"""MatShift written out: what every other implementation must agree with. `shift_literally` is the arithmetic hardware would do."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from . import formats


def matshift(
    x: Float[Tensor, "M K"],
    weight: Tensor,
    scale: Float[Tensor, "N"] | None,
    bias: Float[Tensor, "N"] | None,
    bits: int,
    activation: str,
) -> Float[Tensor, "M N"]:
    """act((x Wᵀ) · scale + bias), accumulated in float32 and rounded once. It multiplies; the factors are powers of two."""
    if bits:
        weight = formats.decode(formats.unpack(weight, bits, x.shape[1]), bits)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).t()
    return finish(y, scale, bias, activation).to(x.dtype)


def matshift_int8(
    x: Int8[Tensor, "M K"],
    x_scale: Float[Tensor, "..."],
    weight: Int8[Tensor, "N K"],
    w_scale: Float[Tensor, "N"],
    bias: Float[Tensor, "N"] | None,
    out_scale: Float[Tensor, "1"] | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The integer product, exact, then scales, bias and activation in float32, then optionally rounding to eight bits."""
    # Sums of products of eight-bit integers are integers below 2^53 for any width in use, so float64 holds them exactly.
    exact = (x.double() @ weight.double().t()).float()
    y = finish(exact * x_scale.reshape(-1, 1) * w_scale, None, bias, activation)
    return quantise(y, out_scale) if out_scale is not None else y.to(out_dtype)


def quantise(y: Float[Tensor, "M N"], scale: Float[Tensor, "1"]) -> Int8[Tensor, "M N"]:
    """round(y / scale), half away from zero, saturated to ±127."""
    y = (y / scale).clamp(-127, 127)
    return (y + torch.copysign(torch.full_like(y, 0.5), y)).trunc().to(torch.int8)


def finish(y: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return F.gelu(y) if activation == "gelu" else y


def shift_literally(
    x: Int[Tensor, "M K"], codes: UInt8[Tensor, "N K"], bits: int
) -> Int[Tensor, "M N"]:
    """Σ_k ±(x_k << p_k) with integers and no multiplication, p = e − 1 ≥ 0: the product times 2^(e_max − 1).

    For small cases only: it materialises (M, N, K). This is what a shift unit would execute (section 4.2).
    """
    e = codes.to(torch.int64) & (2 ** (bits - 1) - 1)
    shifted = x.to(torch.int64).unsqueeze(1) << (e - 1).clamp_min(0)
    signed = torch.where(codes >= 2 ** (bits - 1), -shifted, shifted)
    return torch.where(e == 0, 0, signed).sum(-1)
