"""A mixture of linear experts, each token through its own (ShiftAddViT section 4.3), without a host sync or a data-dependent shape.

Two ways to run it, the same function:

- `dual`: both products are accumulated from one reading of x and each row keeps one. Twice the arithmetic, no more bytes.
- `partition`: the rows of each window of 512 are sorted by expert with a running count, and every tile of sorted rows meets one
  expert, except the one tile a window in which the expert changes.

`auto` partitions where arithmetic outweighs bytes. Both are safe inside a CUDA graph.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, as_rows, choose_backend, same_device
from . import reference

Dispatch = Literal["auto", "dual", "partition"]


def moe_linear(
    x: Float[Tensor, "*tokens in"],
    index: Int[Tensor, "*tokens"],
    weight: Float[Tensor, "experts out in"],
    bias: Float[Tensor, "experts out"] | None = None,
    gate: Float[Tensor, "*tokens"] | None = None,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
) -> Float[Tensor, "*tokens out"]:
    """gate · (x W_eᵀ + b_e), e the token's entry of `index`. Differentiable in x, weight, bias and gate.

    The Triton kernels take two experts. An index other than 0 or 1 is taken as 0 there; the reference gives zeros for one that names
    no expert.
    """
    _check(x, weight, bias, dispatch, backend)
    same_device(x=x, index=index, weight=weight, bias=bias, gate=gate)
    tokens = x.shape[:-1]
    for name, tensor in (("index", index), ("gate", gate)):
        if tensor is not None and tensor.shape != tokens:
            raise UserError(f"{name} must be {tuple(tokens)}, got {tuple(tensor.shape)}")
    y = torch.ops.shiftaddvit.moe_linear(
        as_rows(x), index.reshape(-1), gate.reshape(-1) if gate is not None else None, weight.contiguous(), bias, dispatch, backend
    )
    return y.reshape(*tokens, weight.shape[1])


def routed_linear(
    x: Float[Tensor, "*tokens in"],
    router: Float[Tensor, "experts in"],
    weight: Float[Tensor, "experts out in"],
    bias: Float[Tensor, "experts out"] | None = None,
    dispatch: Dispatch = "auto",
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*tokens out"], Int8[Tensor, "*tokens"]]:
    """The same with the router inside and gate 1, and every token's expert: argmax of x W_rᵀ in float32. For inference."""
    _check(x, weight, bias, dispatch, backend)
    if router.shape != (weight.shape[0], x.shape[-1]):
        raise UserError(f"router must be ({weight.shape[0]}, {x.shape[-1]}), got {tuple(router.shape)}")
    same_device(x=x, router=router, weight=weight, bias=bias)
    y, choice = torch.ops.shiftaddvit.routed_linear(as_rows(x), router, weight.contiguous(), bias, dispatch, backend)
    return y.reshape(*x.shape[:-1], weight.shape[1]), choice.reshape(x.shape[:-1])


def expert_load(choice: Int[Tensor, "*tokens"], experts: int = 2) -> Int32[Tensor, "experts"]:
    """How many tokens went to each expert, counted on the device."""
    ids = torch.arange(experts, device=choice.device, dtype=choice.dtype)
    return (choice.reshape(-1, 1) == ids).sum(0, dtype=torch.int32)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dispatch: str, backend: str) -> None:
    if dispatch not in ("auto", "dual", "partition"):
        raise unknown("dispatch", dispatch, ("auto", "dual", "partition"))
    if weight.dim() != 3 or weight.shape[2] != x.shape[-1] or weight.dtype != x.dtype:
        raise UserError(f"weight must be (experts, out, {x.shape[-1]}) of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise UserError(f"bias must be {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    if weight.shape[0] != 2 and choose_backend(backend, x) == "triton":
        raise UserError(f"the triton backend of moe_linear takes 2 experts, got {weight.shape[0]}; use backend='reference'")


def _sort(x: Tensor, weight: Tensor, dispatch: str) -> bool:
    from .triton import prefer_partition

    return dispatch == "partition" or (dispatch == "auto" and prefer_partition(x.shape[0], *weight.shape[1:]))


@torch.library.custom_op(
    "shiftaddvit::moe_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor? gate, Tensor weight, Tensor? bias, str dispatch, str backend) -> Tensor",
)
def _moe_linear(x, index, gate, weight, bias, dispatch, backend):
    if choose_backend(backend, x) != "triton":
        return reference.moe_linear(x, index, gate, weight, bias)
    from . import triton as kernels

    if _sort(x, weight, dispatch):
        _, order, firsts = kernels.order_rows(x, index, None)
        return kernels.partition(x, order, firsts, gate, weight, bias)
    return kernels.dual(x, index, gate, weight, bias)


@_moe_linear.register_fake
def _(x, index, gate, weight, bias, dispatch, backend):
    return x.new_empty(x.shape[0], weight.shape[1])


def _setup(ctx, inputs, output):
    x, index, gate, weight, bias, ctx.dispatch, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, index, gate, weight, output if gate is not None else None)


def _backward(ctx, grad):
    x, index, gate, weight, output = ctx.saved_tensors
    grad_gate = grad_x = grad_weight = grad_bias = None
    if gate is not None:
        if ctx.needs_input_grad[2]:
            grad_gate = ((grad * output).sum(1, dtype=torch.float32) / gate).to(gate.dtype)
        grad = (grad * gate.unsqueeze(1)).to(grad.dtype)
    if ctx.needs_input_grad[0]:
        turned = weight.transpose(1, 2).contiguous()
        grad_x = torch.ops.shiftaddvit.moe_linear(grad.contiguous(), index, None, turned, None, ctx.dispatch, ctx.backend)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        masks = [(index == expert).unsqueeze(1) for expert in range(weight.shape[0])]
        # where and not a product: a NaN in one expert's rows must not reach the other's weight.
        parts = [torch.where(mask, grad, 0) for mask in masks]
        if ctx.needs_input_grad[3]:
            grad_weight = torch.stack([part.t() @ torch.where(mask, x, 0) for part, mask in zip(parts, masks, strict=True)])
        if ctx.has_bias and ctx.needs_input_grad[4]:
            grad_bias = torch.stack([part.sum(0, dtype=torch.float32) for part in parts]).to(grad.dtype)
    return grad_x, None, grad_gate, grad_weight, grad_bias, None, None


_moe_linear.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "shiftaddvit::routed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor router, Tensor weight, Tensor? bias, str dispatch, str backend) -> (Tensor, Tensor)",
)
def _routed_linear(x, router, weight, bias, dispatch, backend):
    if choose_backend(backend, x) != "triton":
        choice = reference.route(x, router)
        return reference.moe_linear(x, choice, None, weight, bias), choice
    if _sort(x, weight, dispatch):
        from . import triton as kernels

        choice, order, firsts = kernels.order_rows(x, None, router)
        return kernels.partition(x, order, firsts, None, weight, bias), choice
    from ..norm_linear.triton import norm_linear

    return norm_linear(x, None, None, 0.0, weight, bias, router, None, None, "none")


@_routed_linear.register_fake
def _(x, router, weight, bias, dispatch, backend):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], dtype=torch.int8)
