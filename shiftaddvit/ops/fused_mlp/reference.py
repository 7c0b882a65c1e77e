"""The fused MLP pieces written with ordinary torch operations, in float32, rounded once at the end."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from ..matshift.reference import quantise


def experts(
    a: Float[Tensor, "M K"],
    weight: Float[Tensor, "E N K"],
    bias: Float[Tensor, "E N"] | None,
    router: Float[Tensor, "E K"] | None,
) -> tuple[Float[Tensor, "M N"], Int8[Tensor, "M"]]:
    """Every row through the expert with the largest router logit (the first on a tie), and which one it was."""
    y = torch.einsum("mk,enk->men", a, weight.to(a.dtype))
    if bias is not None:
        y = y + bias.to(a.dtype)
    if router is None:
        return y[:, 0], torch.empty(0, dtype=torch.int8, device=a.device)
    second = a @ router[1].to(a.dtype) > a @ router[0].to(a.dtype)
    return torch.where(second.unsqueeze(1), y[:, 1], y[:, 0]), second.to(torch.int8)


def norm_linear(
    x: Float[Tensor, "M K"], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Float[Tensor, "E N K"],
    bias: Float[Tensor, "E N"] | None, router: Tensor | None, residual: Tensor | None, out_scale: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual + act(Expert(LayerNorm(x)))."""
    a = _wide(x)
    if norm_weight is not None:
        a = F.layer_norm(a, a.shape[-1:], norm_weight.to(a.dtype), norm_bias.to(a.dtype), eps)
    y, choice = experts(a, weight, bias, router)
    if activation == "gelu":
        y = F.gelu(y)
    if residual is not None:
        y = y + residual
    return (quantise(y, out_scale) if out_scale is not None else y.to(x.dtype)), choice


def conv_linear(
    h: Tensor, height: int, width: int, conv_weight: Float[Tensor, "9 K"], conv_bias: Float[Tensor, "K"],
    weight: Float[Tensor, "E N K"], bias: Float[Tensor, "E N"] | None, router: Tensor | None, residual: Tensor | None,
    h_scale: Float[Tensor, "K"] | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, half_taps: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[LayerNorm](residual + Expert(GELU(conv3×3(h · h_scale) + conv_bias)))."""
    a = _wide(h)
    if h_scale is not None:
        a = a * h_scale
    k = a.shape[1]
    pictures = a.reshape(-1, height, width, k).permute(0, 3, 1, 2)
    filters = conv_weight.to(a.dtype).t().reshape(k, 1, 3, 3)
    a = F.conv2d(pictures, filters, conv_bias.to(a.dtype), padding=1, groups=k)
    y, choice = experts(F.gelu(a).permute(0, 2, 3, 1).reshape(-1, k), weight, bias, router)
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        y = F.layer_norm(y, y.shape[-1:], norm_weight.to(y.dtype), norm_bias.to(y.dtype), eps)
    return y.to(weight.dtype), choice


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
