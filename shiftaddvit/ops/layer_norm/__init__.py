"""LayerNorm that no product takes along: between stages, before reductions and wide linears, and before the head, where the mean over tokens comes
with it. For inference."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device

WIDEST = 4096
"""Channels that one program can hold."""


def layer_norm(
    x: Float[Tensor, "B N C"],
    weight: Float[Tensor, "C"],
    bias: Float[Tensor, "C"],
    eps: float,
    pool: Literal["none", "mean"] = "none",
    pdl: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """LayerNorm over channels, computed in float32: (B, N, C) in the dtype of x, or with `pool = "mean"` its mean over tokens, (B, C)
    float32. Views with unit stride along C, such as `x[:, 1:]`, are read where they lie."""
    if x.dim() != 3 or weight.shape != x.shape[2:] or bias.shape != x.shape[2:]:
        raise UserError(f"x must be (B, N, C) with weight and bias (C,), got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}")
    if x.shape[2] > WIDEST:
        raise UserError(f"x must have at most {WIDEST} channels, got {x.shape[2]}")
    if pool not in ("none", "mean"):
        raise UserError(f"pool must be 'none' or 'mean', got {pool!r}")
    if pool == "mean" and x.shape[1] == 0:
        raise UserError("a mean needs at least one token")
    same_device(x=x, weight=weight, bias=bias)
    return torch.ops.shiftaddvit.layer_norm(x, weight, bias, eps, pool == "mean", pdl, backend)


@torch.library.custom_op(
    "shiftaddvit::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, bool mean, bool pdl, str backend) -> Tensor",
)
def _layer_norm(x, weight, bias, eps, mean, pdl, backend):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.layer_norm(x if x.stride(-1) == 1 else x.contiguous(), weight, bias, eps, mean, pdl)
    y = F.layer_norm(x.float(), x.shape[2:], weight.float(), bias.float(), eps)
    return y.mean(dim=1) if mean else y.to(x.dtype)


@_layer_norm.register_fake
def _(x, weight, bias, eps, mean, pdl, backend):
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) if mean else x.new_empty(x.shape)
