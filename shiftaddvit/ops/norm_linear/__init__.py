"""LayerNorm, linear, activation and residual, with one expert, or two and a router: in one kernel, or the norm in one of its own.

With two, every row goes to the expert with the larger logit, computed to float32's precision inside the kernel; both products are computed
(twice the arithmetic, no more bytes, no host sync). For inference: this op has no gradient; training
composes `moe_linear` and torch's own layers.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, mixable, overlapping, same_device
from . import reference
from .reference import route_rows

__all__ = ["norm_linear", "route_rows"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def norm_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "experts out in"],
    bias: Float[Tensor, "experts out"] | None = None,
    norm: tuple[Float[Tensor, "in"], Float[Tensor, "in"]] | None = None,
    eps: float = 1e-6,
    router: Float[Tensor, "2 in"] | Float[Tensor, "16 in"] | None = None,
    residual: Float[Tensor, "*batch out"] | None = None,
    out_scale: Float[Tensor, "1"] | None = None,
    activation: str = "none",
    pdl: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Int8[Tensor, "*batch"]]:
    """residual + act(Expert(LayerNorm(x))), and the expert of every row (empty for one expert).

    `weight` may be (out, in) for one expert. `norm` is LayerNorm's weight and bias, None for no normalisation. `router` holds both experts'
    logits, or is what `route_rows` makes of it, which saves two small kernels a call. The result has the dtype of the residual, or without
    one that of the weights; x may have another. With `out_scale` it is round(y / out_scale) as int8. `activation` is `none` or `gelu`.
    `pdl` overlaps the launch with the kernel before it, for chains in which every kernel is launched so; results are the same.
    """
    pdl = overlapping(pdl, weight, bias, router)
    weight, bias = _stacked(x, weight, bias, router)
    if activation not in ("none", "gelu"):
        raise unknown("activation", activation, ("none", "gelu"))
    _vectors(x.shape[-1], norm, "norm")
    same_device(x=x, weight=weight, bias=bias, router=router, residual=residual, out_scale=out_scale)
    shape = (*x.shape[:-1], weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y, choice = torch.ops.shiftaddvit.norm_linear(
        rows, *(norm or (None, None)), eps, weight, bias, router, _rows(residual, shape), out_scale, activation, pdl, backend
    )
    return y.reshape(shape), choice.reshape(x.shape[:-1]) if router is not None else choice


def _stacked(x: Tensor, weight: Tensor, bias: Tensor | None, router: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.dim() == 2:
        weight, bias = weight.unsqueeze(0), bias.unsqueeze(0) if bias is not None else None
    count = weight.shape[0]
    if weight.dim() != 3 or weight.shape[2] != x.shape[-1] or count not in (1, 2):
        raise UserError(f"weight must be (1 or 2 experts, out, {x.shape[-1]}), got {tuple(weight.shape)}")
    if weight.dtype not in _FLOATS or not mixable(weight, x):
        raise UserError(f"x and weight must be float32, or both float16 or bfloat16, got {x.dtype} and {weight.dtype}")
    shapes = ((2, x.shape[-1]), (16, x.shape[-1]))
    if (router is not None) != (count == 2) or (router is not None and router.shape not in shapes):
        raise UserError(
            f"two experts need a router of (2, {x.shape[-1]}) or its `route_rows`, and one expert none, got {count} experts and "
            f"{None if router is None else tuple(router.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise UserError(f"bias must be {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    return weight.contiguous(), bias.contiguous() if bias is not None else None


def _vectors(width: int, pair: tuple[Tensor, Tensor] | None, name: str) -> None:
    if pair is not None and any(vector.shape != (width,) for vector in pair):
        raise UserError(f"{name} must be two vectors of {width}, got {[tuple(vector.shape) for vector in pair]}")


def _rows(residual: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if residual is None:
        return None
    if tuple(residual.shape) != shape:
        raise UserError(f"residual must be {shape}, got {tuple(residual.shape)}")
    return residual.reshape(-1, shape[-1]).contiguous()


@torch.library.custom_op(
    "shiftaddvit::norm_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, Tensor? router, "
    "Tensor? residual, Tensor? out_scale, str activation, bool pdl, str backend) -> (Tensor, Tensor)",
)
def _norm_linear(
    x, norm_weight, norm_bias, eps, weight, bias, router, residual, out_scale, activation, pdl, backend
):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.norm_linear(
            x, norm_weight, norm_bias, eps, weight, bias, router, residual, out_scale, activation, pdl
        )
    return reference.norm_linear(x, norm_weight, norm_bias, eps, weight, bias, router, residual, out_scale, activation)


@_norm_linear.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, router, residual, out_scale, activation, pdl, backend):
    choice = x.new_empty(x.shape[0] if router is not None else 0, dtype=torch.int8)
    dtype = torch.int8 if out_scale is not None else (weight if residual is None else residual).dtype
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype), choice
