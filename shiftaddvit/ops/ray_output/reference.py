"""The formulas."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ray_color(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), eps).mean(dim=1) @ weight.t() + bias


def ray_scores(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, query: Tensor, key: Tensor, heads: int, codes: str, low: float
) -> Tensor:
    """q₀ · k of every point and head (R, S, heads), scaled by 1/√d for `softmax`."""
    a = F.layer_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), eps).to(x.dtype)
    q, k = ((part @ matrix.t()).float().unflatten(-1, (heads, -1)) for part, matrix in ((a[:, :1], query), (a, key)))
    if codes == "softmax":
        return (q * k).sum(dim=-1) * q.shape[-1] ** -0.5
    return (_code(q, codes, low) * _code(k, codes, low)).sum(dim=-1)


def _code(x: Tensor, codes: str, low: float) -> Tensor:
    if codes == "float":
        return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-12)
    level = x.mean(dim=-1, keepdim=True) if codes == "token" else 0.0
    return torch.where(x > level, 1.0, low)
