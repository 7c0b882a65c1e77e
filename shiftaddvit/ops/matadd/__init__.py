"""MatAdd: matrix products with a binary code, which only add (ShiftAddViT section 4.1).

Codes are kept as bits, 32 to a word. `key_value` is Σ_j k_jᵀ v_j and `query_context` is q_i · context; the first argument is either
packed words (then only the values have a gradient) or a float tensor of codes (both have one, and only bits are kept for backward).
A code has two values, `low` and `high`: (0, 1), (−1, 1), or (−½, ½) for centred codes.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from ..bits import pack_bits
from . import reference


def pack_codes(
    codes: Float[Tensor, "B h N r"], low: float = 0.0, high: float = 1.0, backend: Backend = "auto"
) -> Int32[Tensor, "B h N words"]:
    """The bits of codes whose values are `low` and `high`; NaN counts as `low`."""
    return torch.ops.shiftaddvit.matadd_pack(codes, (low + high) / 2, backend)


def key_value(
    codes: Tensor,
    values: Float[Tensor, "B h N d"],
    r: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, "B h r d"]:
    """Σ_j code_jᵀ v_j. `codes`: float (B, h, N, r), or packed int32 (B, h, N, ⌈r/32⌉) with `r` given."""
    _check(codes, values.shape[:3], r, low, high)
    same_device(codes=codes, values=values)
    values = values if values.stride(-1) == 1 else values.contiguous()
    if codes.is_floating_point():
        return torch.ops.shiftaddvit.matadd_key_value_dense(codes, values, low, high, backend)[0]
    return torch.ops.shiftaddvit.matadd_key_value(codes.contiguous(), values, r, low, high, backend)


def query_context(
    codes: Tensor,
    context: Float[Tensor, "B h r d"],
    low: float = 0.0,
    high: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, "B h N d"]:
    """code_i · context. `codes`: float (B, h, N, r), or packed int32 (B, h, N, ⌈r/32⌉)."""
    _check(codes, (*context.shape[:2], codes.shape[2] if codes.dim() == 4 else -1), context.shape[2], low, high)
    same_device(codes=codes, context=context)
    if codes.is_floating_point():
        return torch.ops.shiftaddvit.matadd_query_context_dense(codes, context.contiguous(), low, high, backend)[0]
    return torch.ops.shiftaddvit.matadd_query_context(codes.contiguous(), context.contiguous(), low, high, backend)


def _check(codes: Tensor, leading: tuple[int, ...], r: int | None, low: float, high: float) -> None:
    if codes.dim() != 4 or tuple(codes.shape[:3]) != tuple(leading):
        raise UserError(f"codes must be {tuple(leading)} and codes or words, got {tuple(codes.shape)}")
    if not low < high:
        raise UserError(f"low must be less than high, got {low} and {high}")
    if codes.is_floating_point():
        if r is not None and codes.shape[3] != r:
            raise UserError(f"codes must be {(*leading, r)}, got {tuple(codes.shape)}")
    elif r is None or codes.dtype != torch.int32 or codes.shape[3] != -(-r // 32):
        raise UserError(f"packed codes must be int32 (B, h, N, ⌈r/32⌉) with r given, got {codes.dtype} {tuple(codes.shape)} and r={r}")


@torch.library.custom_op(
    "shiftaddvit::matadd_pack", mutates_args=(), schema="(Tensor codes, float middle, str backend) -> Tensor"
)
def _pack(codes, middle, backend):
    if choose_backend(backend, codes) == "triton":
        from . import triton as kernels

        return kernels.pack(codes, middle)
    return pack_bits(codes > middle)


@_pack.register_fake
def _(codes, middle, backend):
    return codes.new_empty(*codes.shape[:-1], (codes.shape[-1] + 31) // 32, dtype=torch.int32)


@torch.library.custom_op(
    "shiftaddvit::matadd_key_value",
    mutates_args=(),
    schema="(Tensor words, Tensor values, int r, float low, float high, str backend) -> Tensor",
)
def _key_value(words, values, r, low, high, backend):
    if choose_backend(backend, values) == "triton":
        from . import triton as kernels

        return kernels.key_value(words, values, r, low, high)
    return reference.key_value(words, values, r, low, high)


@_key_value.register_fake
def _(words, values, r, low, high, backend):
    return values.new_empty(*values.shape[:2], r, values.shape[3])


@torch.library.custom_op(
    "shiftaddvit::matadd_query_context",
    mutates_args=(),
    schema="(Tensor words, Tensor context, float low, float high, str backend) -> Tensor",
)
def _query_context(words, context, low, high, backend):
    if choose_backend(backend, context) == "triton":
        from . import triton as kernels

        return kernels.query_context(words, context, low, high)
    return reference.query_context(words, context, low, high)


@_query_context.register_fake
def _(words, context, low, high, backend):
    return context.new_empty(*words.shape[:3], context.shape[3])


def _key_value_setup(ctx, inputs, output):
    words, _, _, ctx.low, ctx.high, ctx.backend = inputs
    ctx.save_for_backward(words)


def _key_value_backward(ctx, grad):
    (words,) = ctx.saved_tensors
    grad_values = torch.ops.shiftaddvit.matadd_query_context(words, grad.contiguous(), ctx.low, ctx.high, ctx.backend)
    return None, grad_values, None, None, None, None


_key_value.register_autograd(_key_value_backward, setup_context=_key_value_setup)


def _query_context_setup(ctx, inputs, output):
    words, context, ctx.low, ctx.high, ctx.backend = inputs
    ctx.r = context.shape[2]
    ctx.save_for_backward(words)


def _query_context_backward(ctx, grad):
    (words,) = ctx.saved_tensors
    grad_context = torch.ops.shiftaddvit.matadd_key_value(words, grad.contiguous(), ctx.r, ctx.low, ctx.high, ctx.backend)
    return None, grad_context, None, None, None


_query_context.register_autograd(_query_context_backward, setup_context=_query_context_setup)


@torch.library.custom_op(
    "shiftaddvit::matadd_key_value_dense",
    mutates_args=(),
    schema="(Tensor codes, Tensor values, float low, float high, str backend) -> (Tensor, Tensor)",
)
def _key_value_dense(codes, values, low, high, backend):
    words = _pack(codes, (low + high) / 2, backend)
    return _key_value(words, values, codes.shape[-1], low, high, backend), words


@_key_value_dense.register_fake
def _(codes, values, low, high, backend):
    words = codes.new_empty(*codes.shape[:-1], (codes.shape[-1] + 31) // 32, dtype=torch.int32)
    return values.new_empty(*values.shape[:2], codes.shape[3], values.shape[3]), words


@torch.library.custom_op(
    "shiftaddvit::matadd_query_context_dense",
    mutates_args=(),
    schema="(Tensor codes, Tensor context, float low, float high, str backend) -> (Tensor, Tensor)",
)
def _query_context_dense(codes, context, low, high, backend):
    words = _pack(codes, (low + high) / 2, backend)
    return _query_context(words, context, low, high, backend), words


@_query_context_dense.register_fake
def _(codes, context, low, high, backend):
    words = codes.new_empty(*codes.shape[:-1], (codes.shape[-1] + 31) // 32, dtype=torch.int32)
    return context.new_empty(*codes.shape[:3], context.shape[3]), words


def _dense_setup(ctx, inputs, output):
    codes, other, ctx.low, ctx.high, ctx.backend = inputs
    ctx.dtype, ctx.r = codes.dtype, codes.shape[3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(other, output[1])


def _key_value_dense_backward(ctx, grad, _):
    values, words = ctx.saved_tensors
    grad_codes = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_codes = (values @ grad.to(values.dtype).transpose(-2, -1)).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        grad_values = torch.ops.shiftaddvit.matadd_query_context(words, grad.contiguous(), ctx.low, ctx.high, ctx.backend)
    return grad_codes, grad_values, None, None, None


def _query_context_dense_backward(ctx, grad, _):
    context, words = ctx.saved_tensors
    grad_codes = grad_context = None
    if ctx.needs_input_grad[0]:
        grad_codes = (grad.to(context.dtype) @ context.transpose(-2, -1)).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        grad_context = torch.ops.shiftaddvit.matadd_key_value(words, grad.contiguous(), ctx.r, ctx.low, ctx.high, ctx.backend)
    return grad_codes, grad_context, None, None, None


_key_value_dense.register_autograd(_key_value_dense_backward, setup_context=_dense_setup)
_query_context_dense.register_autograd(_query_context_dense_backward, setup_context=_dense_setup)
