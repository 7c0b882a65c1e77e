"""Functions whose backward keeps less than autograd would: for training mixtures in little more memory than the dense model takes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _KeepsInputs(Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class _WideLinear(_KeepsInputs):
    @staticmethod
    def forward(x, weight):
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight.dtype)
        return to_x, to_weight


class _AttachGate(_KeepsInputs):
    @staticmethod
    def forward(y, gate):
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, gate = ctx.saved_tensors
        return grad, (grad * y).sum(-1, dtype=torch.float32).to(gate.dtype)


def wide_linear(x: Float[Tensor, "*tokens in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*tokens out"]:
    """x Wᵀ in float32. Keeps x as it is, not its float32 copy."""
    return _WideLinear.apply(x, weight)


def attach_gate(y: Float[Tensor, "*tokens out"], gate: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens out"]:
    """y · gate for a gate whose value is one: y itself, with the gradient of both."""
    return _AttachGate.apply(y, gate)


def as_computed(x: Tensor) -> Tensor:
    """x in the dtype that a linear layer takes it in under autocast, so that its cast is made, and kept, once."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
