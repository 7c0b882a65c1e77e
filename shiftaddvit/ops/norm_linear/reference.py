"""LayerNorm and the chosen expert, written with ordinary torch operations, in float32, rounded once at the end."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from ..matshift.reference import quantise


def route_rows(router: Float[Tensor, "2 in"], dtype: torch.dtype) -> Float[Tensor, "16 in"]:
    """A router as one more matrix for the kernel: the rows add up to how far the second expert's logit leads, three parts of `dtype` holding
    float32's precision, the others zero. 16 rows are what a matrix instruction takes."""
    rest, parts = (router[1] - router[0]).float(), []
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts + [torch.zeros_like(parts[0])] * 13)


def experts(
    a: Float[Tensor, "M K"],
    weight: Float[Tensor, "E N K"],
    bias: Float[Tensor, "E N"] | None,
    router: Float[Tensor, "E K"] | Float[Tensor, "16 K"] | None,
) -> tuple[Float[Tensor, "M N"], Int8[Tensor, "M"]]:
    """Every row, rounded to the weights' dtype, through the expert with the largest router logit (the first on a tie), and which it was."""
    a = a.to(weight.dtype).to(a.dtype)
    y = torch.einsum("mk,enk->men", a, weight.to(a.dtype))
    if bias is not None:
        y = y + bias.to(a.dtype)
    if router is None:
        return y[:, 0], torch.empty(0, dtype=torch.int8, device=a.device)
    router = router.to(a.dtype)
    second = a @ router[1] > a @ router[0] if len(router) == 2 else a @ router.sum(dim=0) > 0
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
    return (quantise(y, out_scale) if out_scale is not None else y.to((weight if residual is None else residual).dtype)), choice


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
