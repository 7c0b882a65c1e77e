"""Adder products in torch: exact, and never holding more than a slice of the difference tensor."""

import torch
from jaxtyping import Float
from torch import Tensor

SLICE = 1 << 22
"""Elements of the difference tensor that exist at a time."""


def distance(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """−Σ_k |W − X| for every pair of rows. `cdist` walks the pairs without storing their differences."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], weight.shape[0])
    return -torch.cdist(x.to(wide), weight.to(wide), p=1.0).to(x.dtype)


def grad_x(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], grad: Float[Tensor, "M N"]
) -> Float[Tensor, "M K"]:
    """Σ_n clamp(W − X, −1, 1) · grad, a slice of rows at a time."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = max(1, SLICE // max(weight.numel(), 1))
    parts = []
    for a, g in zip(x.to(wide).split(rows), grad.to(wide).split(rows), strict=True):
        difference = (weight.to(wide).unsqueeze(0) - a.unsqueeze(1)).clamp_(-1, 1)  # (rows, N, K)
        parts.append(torch.einsum("mnk,mn->mk", difference, g))
    return torch.cat(parts).to(x.dtype) if parts else torch.zeros_like(x)


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
