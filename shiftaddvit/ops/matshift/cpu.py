"""MatShift on the CPU: float products through the dense library, eight-bit ones through the integer matrix product where it is fast."""

import torch
from torch import Tensor

from . import formats, reference


def matshift(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, activation: str) -> Tensor:
    """In the dtype of x: one library call, then the epilogue."""
    if bits:
        weight = formats.decode(formats.unpack(weight, bits, x.shape[1]), bits, dtype=x.dtype)
    if scale is None and bias is not None:
        y = torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return torch.nn.functional.gelu(y) if activation == "gelu" else y
    return reference.finish(x @ weight.to(x.dtype).t(), scale, bias, activation).to(x.dtype)


def matshift_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, out_scale: Tensor | None,
    activation: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The exact integer product, as on the GPU, by the fastest route that this processor has."""
    exact = _integer_product(x, weight)
    y = reference.finish(exact * x_scale.reshape(-1, 1) * w_scale, None, bias, activation)
    return reference.quantise(y, out_scale) if out_scale is not None else y.to(out_dtype)


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(x, weight.t()).float()
    # |x| ≤ 128 and |w| ≤ 128: while every partial sum stays below 2^24, float32 holds the integers exactly and runs at full rate.
    exact_in_float = x.shape[1] * 128 * 128 < 2**24
    wide = torch.float32 if exact_in_float else torch.float64
    return (x.to(wide) @ weight.to(wide).t()).float()
