"""Softmax attention for the last stage of PVTs and for DeiT: heads stay merged, so nothing is transposed or copied. For inference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device


def softmax_attention(
    q: Float[Tensor, "B N C"],
    k: Float[Tensor, "B keys C"],
    v: Float[Tensor, "B keys C"],
    heads: int,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "B N C"]:
    """softmax(q kᵀ/√d) v per head. Views such as `qkv[..., :C]` are read where they lie."""
    batch, _, width = q.shape
    if heads < 1 or width % heads or width // heads not in (16, 32, 64, 128):
        raise UserError(f"heads must split {width} channels into heads of 16, 32, 64 or 128, got {heads}")
    if k.shape != v.shape or k.shape[::2] != (batch, width) or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"k and v must be ({batch}, keys, {width}) of {q.dtype}, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}"
        )
    if k.shape[1] == 0:
        raise UserError("attention needs at least one key")
    same_device(q=q, k=k, v=v)
    return torch.ops.shiftaddvit.softmax_attention(q, k, v, heads, pdl, backend)


@torch.library.custom_op(
    "shiftaddvit::softmax_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int heads, bool pdl, str backend) -> Tensor",
)
def _softmax_attention(q, k, v, heads, pdl, backend):
    if choose_backend(backend, q) == "triton":
        from . import triton as kernels

        return kernels.softmax_attention(*(t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)), heads, pdl)
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(q.shape).contiguous()


@_softmax_attention.register_fake
def _(q, k, v, heads, pdl, backend):
    return q.new_empty(q.shape)
