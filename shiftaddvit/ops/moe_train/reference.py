"""The formulas, every expert on every token; sums in float32, or float64 of float64."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ..moe_linear import reference as experts


def forward(
    x: Float[Tensor, "M K"], router: Float[Tensor, "2 K"], noise: Float[Tensor, "M 2"] | None, weight: Float[Tensor, "2 N K"], bias: Float[Tensor, "2 N"] | None
) -> tuple[Float[Tensor, "M N"], Float[Tensor, "M 2"], Int8[Tensor, "M"]]:
    """Output, logits without noise, expert."""
    clean = x.float() @ router.t()
    index = (_lead(clean, noise) > 0).to(torch.int8)
    return experts.moe_linear(x, index, None, weight, bias), clean, index


def backward(
    grad: Float[Tensor, "M N"], grad_clean: Float[Tensor, "M 2"], x: Float[Tensor, "M K"], y: Float[Tensor, "M N"], clean: Float[Tensor, "M 2"],
    index: Int8[Tensor, "M"], router: Float[Tensor, "2 K"], noise: Float[Tensor, "M 2"] | None, weight: Float[Tensor, "2 N K"],
) -> tuple[Float[Tensor, "M K"], Float[Tensor, "sums"]]:  # fmt: skip
    """The gradient of x, and those of weight (2, N, K), bias (2, N) and router (2, K) one behind the other in float32."""
    second = (index == 1).unsqueeze(1)
    step = (grad.float() * y.float()).sum(1, keepdim=True) * torch.sigmoid(-_lead(clean, noise).abs()).unsqueeze(1)
    steps = grad_clean + torch.where(second, torch.cat([-step, step], 1), torch.cat([step, -step], 1))
    to_x = experts.moe_linear(grad.float(), index, None, weight.float().transpose(1, 2), None) + steps @ router
    parts = [torch.where(second == expert, grad.float(), 0) for expert in (False, True)]
    to_weight = torch.stack([part.t() @ x.float() for part in parts])
    to_bias = torch.stack([part.sum(0) for part in parts])
    return to_x.to(x.dtype), torch.cat([to_weight.flatten(), to_bias.flatten(), (steps.t() @ x.float()).flatten()])


def _lead(clean: Tensor, noise: Tensor | None) -> Float[Tensor, "M"]:
    """How far the second logit is above the first."""
    noisy = clean if noise is None else clean + noise
    return noisy[:, 1] - noisy[:, 0]
