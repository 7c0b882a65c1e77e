"""Adder products in torch: exact, and never holding more than a slice of the difference tensor."""

import torch
from jaxtyping import Float
from torch import Tensor

SLICE = 1 << 18
"""Elements of the difference tensor that exist at a time: few enough for a core's cache."""


def distance(x: Float[Tensor, "*G M K"], weight: Float[Tensor, "*G N K"]) -> Float[Tensor, "*G M N"]:
    """−Σ_k |W − X| for every pair of rows. `cdist` walks the pairs without storing their differences."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], weight.shape[-2])
    return -torch.cdist(x.to(wide), weight.to(wide), p=1.0).to(x.dtype)


def grad_x(
    x: Float[Tensor, "*G M K"], weight: Float[Tensor, "*G N K"], grad: Float[Tensor, "*G M N"]
) -> Float[Tensor, "*G M K"]:
    """Σ_n clamp(W − X, −1, 1) · grad, a slice of rows at a time, or of whole groups where these are small."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    m, k = x.shape[-2:]
    n = weight.shape[-2]
    x3, w3, g3 = (t.to(wide).reshape(-1, *t.shape[-2:]) for t in (x, weight, grad))
    if x3.numel() == 0 or n == 0:
        return torch.zeros_like(x)
    groups, rows = max(1, SLICE // (m * n * k)), max(1, SLICE // (n * k))
    parts = []
    for a, w, g in zip(x3.split(groups), w3.split(groups), g3.split(groups), strict=True):
        slices = []
        for a_rows, g_rows in zip(a.split(rows, 1), g.split(rows, 1), strict=True):
            difference = (w.unsqueeze(1) - a_rows.unsqueeze(2)).clamp_(-1, 1)  # (groups, rows, N, K)
            slices.append((g_rows.unsqueeze(2) @ difference).squeeze(2))
        parts.append(torch.cat(slices, 1))
    return torch.cat(parts).reshape(x.shape).to(x.dtype)


def grad_weight(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], grad: Float[Tensor, "M N"], eta: float
) -> Float[Tensor, "N K"]:
    """Σ_m (X − W) · grad, which is two ordinary products, rescaled to length eta·√numel; eta 0 leaves it as it is."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = grad.to(wide)
    raw = g.t() @ x.to(wide) - weight.to(wide) * g.sum(0).unsqueeze(1)
    if eta:
        raw = raw * (eta * raw.numel() ** 0.5 / raw.norm().clamp_min(1e-12))
    return raw.to(weight.dtype)
