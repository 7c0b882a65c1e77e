"""The MLP of a transformer block in two kernels: LayerNorm + fc1, then (PVTv2) depthwise 3×3 + GELU + fc2 + residual.

Both take one expert, or two and a router: then every row goes to the expert with the larger logit, computed in float32 inside the
kernel, both products are accumulated and the row keeps one (twice the arithmetic, no more bytes, no host sync). For inference: these
ops have no gradient; training composes `moe_linear` and torch's own layers.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, same_device
from . import reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def norm_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "experts out in"],
    bias: Float[Tensor, "experts out"] | None = None,
    norm: tuple[Float[Tensor, "in"], Float[Tensor, "in"]] | None = None,
    eps: float = 1e-6,
    router: Float[Tensor, "2 in"] | None = None,
    residual: Float[Tensor, "*batch out"] | None = None,
    out_scale: Float[Tensor, "1"] | None = None,
    activation: str = "none",
    pdl: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Int8[Tensor, "*batch"]]:
    """residual + act(Expert(LayerNorm(x))), and the expert of every row (empty for one expert).

    `weight` may be (out, in) for one expert. `norm` is LayerNorm's weight and bias, None for no normalisation. With `out_scale` the
    result is round(y / out_scale) as int8. `activation` is `none` or `gelu`. `pdl` overlaps the launch with the kernel before it, for
    chains in which every kernel is launched so; results are the same.
    """
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


def conv_linear(
    h: Tensor,
    height: int,
    width: int,
    conv_weight: Float[Tensor, "9 hidden"],
    conv_bias: Float[Tensor, "hidden"],
    weight: Float[Tensor, "experts out hidden"],
    bias: Float[Tensor, "experts out"] | None = None,
    router: Float[Tensor, "2 hidden"] | None = None,
    residual: Float[Tensor, "B N out"] | None = None,
    h_scale: Float[Tensor, "hidden"] | None = None,
    norm: tuple[Float[Tensor, "out"], Float[Tensor, "out"]] | None = None,
    eps: float = 1e-6,
    half_taps: bool = False,
    pdl: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Int8[Tensor, "B N"]]:
    """[LayerNorm](residual + Expert(GELU(conv3×3(h) + conv_bias))) over tokens h (B, height · width, hidden) in raster order.

    `conv_weight[3·dy + dx, c]` is `conv.weight[c, 0, dy, dx]`. int8 h needs `h_scale`, the value of one unit in each channel. `norm`
    applies a stage's closing LayerNorm. `half_taps` sums the nine taps of a float16 h in float16, twice as fast where instructions are
    the limit; relative error about 1e-3. The other arguments are those of `norm_linear`.
    """
    if h.dim() != 3 or h.shape[1] != height * width:
        raise UserError(f"h must be (B, {height}·{width}, hidden), got {tuple(h.shape)}")
    if (h.dtype == torch.int8) != (h_scale is not None):
        raise UserError(f"h_scale goes with int8 h and only with it, h is {h.dtype}")
    hidden = h.shape[-1]
    if conv_weight.shape != (9, hidden) or conv_bias.shape != (hidden,):
        raise UserError(
            f"conv_weight must be (9, {hidden}) and conv_bias ({hidden},), got {tuple(conv_weight.shape)} and {tuple(conv_bias.shape)}"
        )
    weight, bias = _stacked(h, weight, bias, router)
    _vectors(weight.shape[1], norm, "norm")
    same_device(h=h, conv_weight=conv_weight, weight=weight, bias=bias, router=router, residual=residual, h_scale=h_scale)
    shape = (*h.shape[:2], weight.shape[1])
    y, choice = torch.ops.shiftaddvit.conv_linear(
        h.reshape(-1, hidden).contiguous(), height, width, conv_weight.contiguous(), conv_bias, weight, bias, router,
        _rows(residual, shape), h_scale, *(norm or (None, None)), eps, half_taps, pdl, backend,
    )  # fmt: skip
    return y.reshape(shape), choice.reshape(h.shape[:2]) if router is not None else choice


def _stacked(x: Tensor, weight: Tensor, bias: Tensor | None, router: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.dim() == 2:
        weight, bias = weight.unsqueeze(0), bias.unsqueeze(0) if bias is not None else None
    count = weight.shape[0]
    if weight.dim() != 3 or weight.shape[2] != x.shape[-1] or count not in (1, 2):
        raise UserError(f"weight must be (1 or 2 experts, out, {x.shape[-1]}), got {tuple(weight.shape)}")
    if weight.dtype not in _FLOATS or x.dtype not in (weight.dtype, torch.int8):
        raise UserError(f"x and weight must share one of float16, bfloat16, float32, got {x.dtype} and {weight.dtype}")
    if (router is not None) != (count == 2) or (router is not None and router.shape != (2, x.shape[-1])):
        raise UserError(
            f"two experts need a router of (2, {x.shape[-1]}) and one expert none, got {count} experts and "
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
    return x.new_empty(x.shape[0], weight.shape[1], dtype=torch.int8 if out_scale is not None else x.dtype), choice


@torch.library.custom_op(
    "shiftaddvit::conv_linear",
    mutates_args=(),
    schema="(Tensor h, int height, int width, Tensor conv_weight, Tensor conv_bias, Tensor weight, Tensor? bias, Tensor? router, "
    "Tensor? residual, Tensor? h_scale, Tensor? norm_weight, Tensor? norm_bias, float eps, bool half_taps, bool pdl, str backend) "
    "-> (Tensor, Tensor)",
)
def _conv_linear(
    h, height, width, conv_weight, conv_bias, weight, bias, router, residual, h_scale, norm_weight, norm_bias, eps, half_taps,
    pdl, backend,
):  # fmt: skip
    arguments = (
        h, height, width, conv_weight, conv_bias, weight, bias, router, residual, h_scale, norm_weight, norm_bias, eps, half_taps,
    )  # fmt: skip
    if choose_backend(backend, h) == "triton":
        from . import triton as kernels

        return kernels.conv_linear(*arguments, pdl)
    return reference.conv_linear(*arguments)


@_conv_linear.register_fake
def _(
    h, height, width, conv_weight, conv_bias, weight, bias, router, residual, h_scale, norm_weight, norm_bias, eps, half_taps,
    pdl, backend,
):  # fmt: skip
    choice = h.new_empty(h.shape[0] if router is not None else 0, dtype=torch.int8)
    return weight.new_empty(h.shape[0], weight.shape[1]), choice
