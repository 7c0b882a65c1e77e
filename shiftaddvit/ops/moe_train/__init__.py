"""A mixture of two linear experts with its router, for training (ShiftAddViT section 4.3): what `router`, `moe_linear` and a gate of value one
compute together, forward and backward, in few launches and without a host sync.

With z = x W_rᵀ + noise and p = softmax(z), each token takes expert e = argmax z; its gate p_e / stopgrad(p_e) is one, and gives the
router its gradient: ∂L/∂z_e = −∂L/∂z_other = ⟨∂L/∂y, y⟩ · (1 − p_e).

A token that is not finite stays alone forward; backward it reaches the weights of both experts. Such a step is not to be taken anyway.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, as_rows, choose_backend, same_device
from . import reference

__all__ = ["moe_train"]


def moe_train(
    x: Float[Tensor, "*tokens in"],
    router: Float[Tensor, "2 in"],
    noise: Float[Tensor, "*tokens 2"] | None,
    weight: Float[Tensor, "2 out in"],
    bias: Float[Tensor, "2 out"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*tokens out"], Float[Tensor, "*tokens 2"], Int8[Tensor, "*tokens"]]:
    """(x W_eᵀ + b_e, x W_rᵀ, e) for every token's expert e = argmax(x W_rᵀ + noise), the first on a tie.

    Differentiable in x, router, weight and bias, through the output, its gate and the logits. x and weight have one dtype; router, noise and
    logits are float32.
    """
    tokens = x.shape[:-1]
    if weight.dim() != 3 or len(weight) != 2 or weight.shape[2] != x.shape[-1] or weight.dtype != x.dtype:
        raise UserError(f"weight must be (2, out, {x.shape[-1]}) of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}")
    for name, tensor, shape in (("router", router, (2, x.shape[-1])), ("noise", noise, (*tokens, 2)), ("bias", bias, weight.shape[:2])):
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("router", router), ("noise", noise)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise UserError(f"{name} must be float32, got {tensor.dtype}")
    same_device(x=x, router=router, noise=noise, weight=weight, bias=bias)
    rows = as_rows(x)
    y, clean, index = torch.ops.shiftaddvit.moe_train(
        rows, router.contiguous(), noise.reshape(-1, 2).contiguous() if noise is not None else None, weight.contiguous(),
        bias.contiguous() if bias is not None else None, backend,
    )  # fmt: skip
    return y.reshape(*tokens, weight.shape[1]), clean.reshape(*tokens, 2), index.reshape(tokens)


@torch.library.custom_op(
    "shiftaddvit::moe_train",
    mutates_args=(),
    schema="(Tensor x, Tensor router, Tensor? noise, Tensor weight, Tensor? bias, str backend) -> (Tensor, Tensor, Tensor)",
)
def _moe_train(x, router, noise, weight, bias, backend):
    if choose_backend(backend, x) != "triton":
        return reference.forward(x, router, noise, weight, bias)
    from . import triton as kernels

    return kernels.forward(x, router, noise, weight, bias)


@_moe_train.register_fake
def _(x, router, noise, weight, bias, backend):
    m = x.shape[0]
    return x.new_empty(m, weight.shape[1]), x.new_empty(m, 2, dtype=torch.float32), x.new_empty(m, dtype=torch.int8)


@torch.library.custom_op(
    "shiftaddvit::moe_train_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_clean, Tensor x, Tensor y, Tensor clean, Tensor index, Tensor router, Tensor? noise, Tensor weight, "
    "str backend) -> (Tensor, Tensor)",
)
def _moe_train_backward(grad, grad_clean, x, y, clean, index, router, noise, weight, backend):
    arguments = grad, grad_clean, x, y, clean, index, router, noise, weight
    if choose_backend(backend, x) != "triton":
        return reference.backward(*arguments)
    from . import triton as kernels

    return kernels.backward(*arguments)


@_moe_train_backward.register_fake
def _(grad, grad_clean, x, y, clean, index, router, noise, weight, backend):
    return x.new_empty(x.shape), x.new_empty(sum(_sizes(weight)), dtype=torch.float32)


def _sizes(weight: Tensor) -> tuple[int, int, int]:
    """Of the gradients of weight, bias and router, which come one behind the other."""
    _, n, k = weight.shape
    return 2 * n * k, 2 * n, 2 * k


def _setup(ctx, inputs, output):
    x, router, noise, weight, bias, ctx.backend = inputs
    y, clean, index = output
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, y, clean, index, router, noise, weight)
    ctx.mark_non_differentiable(index)


def _backward(ctx, grad, grad_clean, _):
    x, y, clean, index, router, noise, weight = ctx.saved_tensors
    to_x, sums = torch.ops.shiftaddvit.moe_train_backward(
        as_rows(grad), grad_clean.contiguous(), x, y, clean, index, router, noise, weight, ctx.backend
    )
    to_weight, to_bias, to_router = sums.split(_sizes(weight))
    to_bias = to_bias.view(weight.shape[:2]).to(ctx.bias_dtype) if ctx.bias_dtype is not None else None
    return to_x, to_router.view(router.shape), None, to_weight.view(weight.shape).to(weight.dtype), to_bias, None


_moe_train.register_autograd(_backward, setup_context=_setup)
