"""Patch embedding: convolution, LayerNorm, class tokens and positions in one kernel, from a picture or from tokens. For inference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference
from .reference import padded_side, unflatten_weight

__all__ = ["flatten_weight", "padded_side", "patch_embed", "unflatten_weight"]


def flatten_weight(weight: Float[Tensor, "out in kernel kernel"], planes: bool) -> Float[Tensor, "out flat"]:
    """A convolution's weight in the order that `patch_embed` reads.

    For pictures (`planes`) as it is, but with zero rows below and zero columns on the left that make the side a power of two (`padded_side`);
    for tokens channels last. A pixel that a window's zero column lies on is multiplied by 0, so one that is not finite spoils two windows.
    `unflatten_weight` undoes it.
    """
    if planes:
        missing = padded_side(weight.shape[2]) - weight.shape[2]
        return F.pad(weight, (missing, 0, 0, missing)).flatten(1).contiguous()
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Float[Tensor, "out"] | None = None,
    stride: int = 1,
    padding: int = 0,
    size: tuple[int, int] | None = None,
    kernel: int | None = None,
    norm: tuple[Float[Tensor, "out"], Float[Tensor, "out"]] | None = None,
    eps: float = 1e-6,
    prefix: Float[Tensor, "P out"] | None = None,
    position: Float[Tensor, "tokens out"] | None = None,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "B tokens out"]:
    """Tokens (B, P + H'·W', out) of [LayerNorm](conv(x)) behind the P prefix rows, plus `position`.

    x is a picture (B, in, H, W) of any float dtype, or tokens (B, H·W, in) with `size` = (H, W). `weight` is (out, in, k, k), or, without
    a copy at each call, flat from `flatten_weight` with `kernel` = k. The result has the dtype of `weight`.
    """
    planes = size is None
    if x.dim() != (4 if planes else 3):
        raise UserError(f"x must be (B, in, H, W), or (B, H·W, in) with size=(H, W), got {tuple(x.shape)} and size={size}")
    height, width = x.shape[2:] if planes else size
    channels = x.shape[1] if planes else x.shape[2]
    if not planes and x.shape[1] != height * width:
        raise UserError(f"x has {x.shape[1]} tokens but size={size} means {height * width}")
    if kernel is None:
        if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != weight.shape[3]:
            raise UserError(f"weight must be (out, {channels}, k, k), got {tuple(weight.shape)}")
        kernel, weight = weight.shape[2], flatten_weight(weight, planes)
    flat = channels * (padded_side(kernel) if planes else kernel) ** 2
    if weight.dim() != 2 or weight.shape[1] != flat:
        raise UserError(f"flat weight must be (out, {flat}) for kernel={kernel}, as flatten_weight makes it, got {tuple(weight.shape)}")
    outputs = weight.shape[0]
    rows, columns = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    if rows < 1 or columns < 1:
        raise UserError(f"a {height}×{width} picture with padding {padding} has no {kernel}×{kernel} patch")
    tokens = rows * columns + (prefix.shape[0] if prefix is not None else 0)
    if prefix is not None and prefix.shape[1:] != (outputs,):
        raise UserError(f"prefix must be (P, {outputs}), got {tuple(prefix.shape)}")
    if position is not None and position.shape != (tokens, outputs):
        raise UserError(f"position must be ({tokens}, {outputs}), got {tuple(position.shape)}")
    same_device(x=x, weight=weight, bias=bias, prefix=prefix, position=position)
    return torch.ops.shiftaddvit.patch_embed(
        x.contiguous(), weight.contiguous(), bias, *(norm or (None, None)), eps, prefix.contiguous() if prefix is not None else None,
        position.contiguous() if position is not None else None, height, width, kernel, stride, padding, planes, pdl, backend,
    )  # fmt: skip


@torch.library.custom_op(
    "shiftaddvit::patch_embed",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? prefix, "
    "Tensor? position, SymInt height, SymInt width, int kernel, int stride, int padding, bool planes, bool pdl, str backend) -> Tensor",
)
def _patch_embed(
    x, weight, bias, norm_weight, norm_bias, eps, prefix, position, height, width, kernel, stride, padding, planes, pdl, backend
):
    arguments = (
        x, weight, bias, norm_weight, norm_bias, eps, prefix, position, height, width, kernel, stride, padding, planes,
    )  # fmt: skip
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.patch_embed(*arguments, pdl)
    return reference.patch_embed(*arguments)


@_patch_embed.register_fake
def _(
    x, weight, bias, norm_weight, norm_bias, eps, prefix, position, height, width, kernel, stride, padding, planes, pdl, backend
):
    rows, columns = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    return weight.new_empty(x.shape[0], (0 if prefix is None else prefix.shape[0]) + rows * columns, weight.shape[0])
