"""MatShift: y = x Wᵀ with weights that are zero or ± a power of two (ShiftAddViT section 4.2).

On a tensor-core GPU a shift is a number format and not an instruction: ±2^p is exact in every float and, at 4 bits, in int8, so the
matrix units compute the very product that shifters would. The precision is that of the activations:

- bfloat16 and float16: native.
- float32: each row split exactly into two float16 parts, so two products give float32-grade results.
- int8: `matshift_int8`, accumulated exactly, the same integers on GPU and CPU.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, as_rows, choose_backend, same_device
from . import cpu, formats, reference

_HAS = ("reference", "triton", "cpu")
_ACTIVATIONS = ("none", "gelu")


def matshift(
    x: Float[Tensor, "*batch in"],
    weight: Tensor,
    bias: Float[Tensor, "out"] | None = None,
    scale: Float[Tensor, "out"] | None = None,
    bits: int = 0,
    activation: str = "none",
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out"]:
    """act((x Wᵀ) · scale + bias), accumulated in float32.

    `weight` is (out, in) and floating, expanded by `formats.decode` (`bits` 0), or packed codes (out, bytes) at `bits` 4 or 5.
    `scale` is 2^offset of the channels, `formats.channel_scale`; leave it out where the offset is already in an expanded weight. For
    float32 activations expanded weights must be exact in float16, that is, decoded without their offset.
    `activation` is `none` or `gelu`. Differentiable in x, bias and an expanded weight; not in packed codes nor in scale.
    """
    _check(x, weight, bias, scale, bits, activation)
    y = torch.ops.shiftaddvit.matshift(as_rows(x), weight.contiguous(), scale, bias, bits, activation, backend)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def matshift_int8(
    x: Int8[Tensor, "*batch in"],
    x_scale: Float[Tensor, "..."],
    weight: Int8[Tensor, "out in"],
    w_scale: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None = None,
    out_scale: Float[Tensor, "1"] | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """act((x Wᵀ) · x_scale · w_scale + bias) with the integer product exact.

    `weight` and `w_scale` come from `formats.decode_int8`. `x_scale` has one element, or one a token. With `out_scale` (one element)
    the result is round(y / out_scale) as int8, saturated to ±127 (NaN becomes an unspecified integer), otherwise `out_dtype`.
    """
    if x.dtype != torch.int8 or weight.dtype != torch.int8:
        raise UserError(f"matshift_int8 needs int8 x and weight, got {x.dtype} and {weight.dtype}")
    if x_scale.numel() not in (1, x.numel() // max(x.shape[-1], 1)):
        raise UserError(f"x_scale must have 1 element or one a token, got {tuple(x_scale.shape)} for x {tuple(x.shape)}")
    if w_scale.numel() != weight.shape[0]:
        raise UserError(f"w_scale must have {weight.shape[0]} elements, got {tuple(w_scale.shape)}")
    _check(x, weight, bias, None, 0, activation)
    y = torch.ops.shiftaddvit.matshift_int8(
        as_rows(x), x_scale.float().reshape(-1), weight.contiguous(), w_scale.float(), bias, out_scale, activation, out_dtype, backend
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, bits: int, activation: str) -> None:
    same_device(x=x, weight=weight, bias=bias, scale=scale)
    if activation not in _ACTIVATIONS:
        raise unknown("activation", activation, _ACTIVATIONS)
    if x.dim() == 0 or weight.dim() != 2:
        raise UserError(f"x must be (..., in) and weight (out, in), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bits:
        expected = formats.packed_bytes(x.shape[-1], bits)
        if weight.dtype != torch.uint8 or weight.shape[1] != expected:
            raise UserError(
                f"packed weight must be uint8 (out, {expected}) for {x.shape[-1]} inputs at {bits} bits, "
                f"got {weight.dtype} {tuple(weight.shape)}"
            )
    elif weight.shape[1] != x.shape[-1]:
        raise UserError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}: its inputs must be {x.shape[-1]}")
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise UserError(f"{name} must be ({weight.shape[0]},), got {tuple(vector.shape)}")


@torch.library.custom_op(
    "shiftaddvit::matshift",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int bits, str activation, str backend) -> Tensor",
)
def _matshift(x, weight, scale, bias, bits, activation, backend):
    chosen = choose_backend(backend, x, _HAS)
    if chosen == "triton":
        from . import triton as kernels

        return kernels.matshift(x, weight, scale, bias, bits, activation)
    return (cpu if chosen == "cpu" else reference).matshift(x, weight, scale, bias, bits, activation)


@_matshift.register_fake
def _(x, weight, scale, bias, bits, activation, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, scale, bias, ctx.bits, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(x, weight, scale, bias)


def _backward(ctx, grad):
    x, weight, scale, bias = ctx.saved_tensors
    if ctx.activation == "gelu":
        before = torch.ops.shiftaddvit.matshift(x, weight, scale, bias, ctx.bits, "none", ctx.backend)
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_bias = grad.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
    if scale is not None:
        grad = (grad * scale).to(grad.dtype)
    dense = formats.decode(formats.unpack(weight, ctx.bits, x.shape[1]), ctx.bits) if ctx.bits else weight
    grad_x = grad @ dense.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = (grad.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] and not ctx.bits else None
    return grad_x, grad_weight, None, grad_bias, None, None, None


_matshift.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "shiftaddvit::matshift_int8",
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, Tensor? out_scale, str activation, "
    "ScalarType out_dtype, str backend) -> Tensor",
)
def _matshift_int8(x, x_scale, weight, w_scale, bias, out_scale, activation, out_dtype, backend):
    chosen = choose_backend(backend, x, _HAS)
    out_dtype = torch.int8 if out_scale is not None else out_dtype
    if chosen == "triton":
        from . import triton as kernels

        return kernels.matshift_int8(x, x_scale, weight, w_scale, bias, out_scale, activation, out_dtype)
    return (cpu if chosen == "cpu" else reference).matshift_int8(
        x, x_scale, weight, w_scale, bias, out_scale, activation, out_dtype
    )


@_matshift_int8.register_fake
def _(x, x_scale, weight, w_scale, bias, out_scale, activation, out_dtype, backend):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.int8 if out_scale is not None else out_dtype)
