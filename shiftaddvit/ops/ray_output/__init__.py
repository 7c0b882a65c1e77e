"""What comes out of a ray: its colour, and how much its first point attends to each point (GNT's "learned density").

For inference: no gradient.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, same_device
from . import reference

Codes = Literal["softmax", "token", "zero", "float"]


def ray_color(
    x: Float[Tensor, "R S C"],
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    weight: Float[Tensor, "3 C"],
    bias: Float[Tensor, "3"],
    backend: Backend = "auto",
) -> Float[Tensor, "R 3"]:
    """weight · mean over the points of LayerNorm(x) + bias, in float32."""
    if x.shape[-1] not in (16, 32, 64, 128) or weight.shape != (3, x.shape[-1]) or bias.shape != (3,):
        raise UserError(f"ray_color takes x (R, S, 16, 32, 64 or 128), weight (3, C) and bias (3,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    same_device(x=x, weight=weight, bias=bias)
    return torch.ops.shiftaddvit.ray_color(x.contiguous(), *norm, eps, weight.float().contiguous(), bias.float(), backend)


def ray_weights(
    x: Float[Tensor, "R S C"],
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    query: Float[Tensor, "C C"],
    key: Float[Tensor, "C C"],
    heads: int,
    codes: Codes = "softmax",
    low: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "R S"]:
    """The first point's attention to every point of its ray, mean over the heads, float32; sums to 1.

    `softmax`: softmax(q₀ kᵀ/√d). Otherwise the similarity of codes, max(q₀ · k, 0) + 1e-4, made to sum to 1: codes are {low, 1}, 1 where a
    channel is above the head's mean (`token`) or zero (`zero`), or unit-length vectors (`float`).
    """
    if codes not in ("softmax", "token", "zero", "float"):
        raise unknown("codes", codes, ("softmax", "token", "zero", "float"))
    width = x.shape[-1]
    if width not in (16, 32, 64, 128) or width % heads or (width // heads) & (width // heads - 1):
        raise UserError(f"ray_weights takes 16, 32, 64 or 128 channels in heads of a power of two, got {width} in {heads} heads")
    if query.shape != (width, width) or key.shape != (width, width) or not query.dtype == key.dtype == x.dtype:
        raise UserError(f"query and key must be {x.dtype} ({width}, {width}), got {query.dtype} {tuple(query.shape)} and {tuple(key.shape)}")
    same_device(x=x, query=query, key=key)
    scores = torch.ops.shiftaddvit.ray_scores(x.contiguous(), *norm, eps, query.contiguous(), key.contiguous(), heads, codes, low, backend)
    if codes == "softmax":
        return scores.softmax(dim=1).mean(dim=-1)
    similarity = scores.clamp_min(0) + 1e-4
    return (similarity / similarity.sum(dim=1, keepdim=True)).mean(dim=-1)


@torch.library.custom_op(
    "shiftaddvit::ray_color",
    mutates_args=(),
    schema="(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor bias, str backend) -> Tensor",
)
def _ray_color(x, norm_weight, norm_bias, eps, weight, bias, backend):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.ray_color(x, norm_weight, norm_bias, eps, weight, bias)
    return reference.ray_color(x, norm_weight, norm_bias, eps, weight, bias)


@_ray_color.register_fake
def _(x, *_rest):
    return x.new_empty(x.shape[0], 3, dtype=torch.float32)


@torch.library.custom_op(
    "shiftaddvit::ray_scores",
    mutates_args=(),
    schema="(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor query, Tensor key, int heads, str codes, float low, "
    "str backend) -> Tensor",
)
def _ray_scores(x, norm_weight, norm_bias, eps, query, key, heads, codes, low, backend):
    arguments = (x, norm_weight, norm_bias, eps, query, key, heads, codes, low)
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.ray_scores(*arguments)
    return reference.ray_scores(*arguments)


@_ray_scores.register_fake
def _(x, norm_weight, norm_bias, eps, query, key, heads, codes, low, backend):
    return x.new_empty(*x.shape[:2], heads, dtype=torch.float32)
