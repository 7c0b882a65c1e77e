"""GNT's ray transformer in one kernel: LayerNorm, attention along the ray, projection, residual, feed-forward.

Every ray is a program's own: its keys and values, or with linear attention the d × d context of each head, never leave the multiprocessor's
reach. Attention is softmax, or linear over binary or unit-length queries and keys (ops/linear_attention has the formula and the wider
choice of forms). For inference: no gradient.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, same_device
from ..feed_forward import Feed
from . import reference

Form = Literal["softmax", "token", "zero", "float"]
FORMS = ("softmax", "token", "zero", "float")


def ray_transformer(
    x: Float[Tensor, "R S C"],
    heads: int,
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    qkv: Float[Tensor, "3C C"],
    proj: Float[Tensor, "C C"],
    proj_bias: Float[Tensor, "C"] | None,
    feed: Feed,
    feed_eps: float,
    form: Form = "softmax",
    low: float = 0.0,
    own: bool = True,
    context_mean: bool = True,
    unit: bool = True,
    conv: Float[Tensor, "h window"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "R S C"]:
    """y + FFN(y) with y = x + proj · attention(LayerNorm(x)) along S.

    `form` is `softmax`, or how queries and keys become codes: 1 where a channel is above the head's mean (`token`) or zero (`zero`), else
    `low`; or unit-length (`float`). Linear attention is ½ v (if `own`) + q · Σ kᵀv / π (divided by S if `context_mean`), each head scaled to
    length one (if `unit`), plus the convolution of v along the ray. Heads are 16, 32 or 64 channels wide.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    width = x.shape[-1]
    if width not in (16, 32, 64, 128) or heads < 1 or width % heads or width // heads not in (16, 32, 64):
        raise UserError(f"ray_transformer takes 16, 32, 64 or 128 channels in heads of 16, 32 or 64, got {width} in {heads} heads")
    for name, tensor, shape in (("qkv", qkv, (3 * width, width)), ("proj", proj, (width, width))):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            raise UserError(f"{name} must be {x.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if conv is not None and (form == "softmax" or conv.dim() != 2 or conv.shape[0] != heads or conv.shape[1] % 2 == 0):
        raise UserError(f"conv must be ({heads}, odd window) and goes with linear attention, got {tuple(conv.shape)} with form {form!r}")
    same_device(x=x, qkv=qkv, proj=proj, proj_bias=proj_bias, conv=conv)
    return torch.ops.shiftaddvit.ray_transformer(
        x.contiguous(), heads, *norm, eps, qkv.contiguous(), proj.contiguous(), proj_bias, list(feed.check(x)), feed_eps, form, low, own,
        context_mean, unit, conv.contiguous() if conv is not None else None, backend,
    )  # fmt: skip


@torch.library.custom_op(
    "shiftaddvit::ray_transformer",
    mutates_args=(),
    schema="(Tensor x, int heads, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv, Tensor proj, Tensor? proj_bias, "
    "Tensor?[] feed, float feed_eps, str form, float low, bool own, bool context_mean, bool unit, Tensor? conv, str backend) -> Tensor",
)
def _ray_transformer(x, heads, norm_weight, norm_bias, eps, qkv, proj, proj_bias, feed, feed_eps, form, low, own, context_mean, unit, conv, backend):
    arguments = (x, heads, norm_weight, norm_bias, eps, qkv, proj, proj_bias, feed, feed_eps, form, low, own, context_mean, unit, conv)
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.ray_transformer(*arguments)
    return reference.ray_transformer(*arguments)


@_ray_transformer.register_fake
def _(x, *_rest):
    return torch.empty_like(x)
