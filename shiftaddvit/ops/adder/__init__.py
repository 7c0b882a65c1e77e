"""Adder products: Y = −Σ_k |W − X|, the L1 distance in place of the inner product (AdderNet).

Gradients are AdderNet's own: for the weight Σ (X − W)·g, rescaled to the length η·√numel; for the input Σ clamp(W − X, −1, 1)·g.
Forward and backward keep the difference tensor (tokens × out × in) out of memory.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference


def adder_linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], eta: float = 0.2, backend: Backend = "auto"
) -> Float[Tensor, "*batch out"]:
    """−Σ_k |weight[o, k] − x[…, k]|. `eta` is the length of the weight's gradient, in units of √numel; 0 leaves it unscaled."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise UserError(f"weight must be (out, {x.shape[-1]}) of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}")
    if eta < 0:
        raise UserError(f"eta must be 0 or positive, got {eta}")
    same_device(x=x, weight=weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return torch.ops.shiftaddvit.adder(rows, weight.contiguous(), eta, backend).reshape(*x.shape[:-1], weight.shape[0])


def adder_conv2d(
    x: Float[Tensor, "B in H W"],
    weight: Float[Tensor, "out in kernel kernel"],
    stride: int = 1,
    padding: int = 0,
    eta: float = 0.2,
    backend: Backend = "auto",
) -> Float[Tensor, "B out H2 W2"]:
    """The same over the patches of a picture; padding takes part with zeros, as in AdderNet."""
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise UserError(f"x must be (B, in, H, W) and weight (out, in, k, k), got {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, _, height, width = x.shape
    kernel = weight.shape[2:]
    patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)  # (B, H'·W', in·k·k)
    y = adder_linear(patches, weight.flatten(1), eta, backend)
    rows = (height + 2 * padding - kernel[0]) // stride + 1
    columns = (width + 2 * padding - kernel[1]) // stride + 1
    return y.transpose(1, 2).reshape(batch, weight.shape[0], rows, columns)


def adder_scores(
    q: Float[Tensor, "B h M d"], k: Float[Tensor, "B h N d"], backend: Backend = "auto"
) -> Float[Tensor, "B h M N"]:
    """−Σ_d |q_i − k_j|: the scores of adder attention. Both operands are activations, so both get the clamped gradient."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise UserError(f"q and k must be (B, h, tokens, d) of one dtype, got {tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}")
    same_device(q=q, k=k)
    return torch.ops.shiftaddvit.adder_scores(q.contiguous(), k.contiguous(), backend)


@torch.library.custom_op(
    "shiftaddvit::adder", mutates_args=(), schema="(Tensor x, Tensor weight, float eta, str backend) -> Tensor"
)
def _adder(x, weight, eta, backend):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.distance(x, weight)
    return reference.distance(x, weight)


@_adder.register_fake
def _(x, weight, eta, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op(
    "shiftaddvit::adder_grad_x", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor grad, str backend) -> Tensor"
)
def _adder_grad_x(x, weight, grad, backend):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.grad_x(x, weight, grad)
    return reference.grad_x(x, weight, grad)


@_adder_grad_x.register_fake
def _(x, weight, grad, backend):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    x, weight, ctx.eta, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = torch.ops.shiftaddvit.adder_grad_x(x, weight, grad.contiguous(), ctx.backend) if ctx.needs_input_grad[0] else None
    grad_weight = reference.grad_weight(x, weight, grad, ctx.eta) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None


_adder.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("shiftaddvit::adder_scores", mutates_args=(), schema="(Tensor q, Tensor k, str backend) -> Tensor")
def _adder_scores(q, k, backend):
    if choose_backend(backend, q) == "triton":
        from . import triton as kernels

        return kernels.distance(q, k)
    return reference.distance(q, k)


@_adder_scores.register_fake
def _(q, k, backend):
    return q.new_empty(*q.shape[:-1], k.shape[-2])


def _setup_scores(ctx, inputs, output):
    q, k, ctx.backend = inputs
    ctx.save_for_backward(q, k)


def _backward_scores(ctx, grad):
    q, k = ctx.saved_tensors
    op = torch.ops.shiftaddvit.adder_grad_x
    grad_q = op(q, k, grad.contiguous(), ctx.backend) if ctx.needs_input_grad[0] else None
    grad_k = op(k, q, grad.transpose(-2, -1).contiguous(), ctx.backend) if ctx.needs_input_grad[1] else None
    return grad_q, grad_k, None


_adder_scores.register_autograd(_backward_scores, setup_context=_setup_scores)
