"""Importance and load of the experts in torch, for any number of them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def win_probability(logits: Float[Tensor, "*tokens experts"], clean: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """Φ((clean_i − the best other logit) · experts)."""
    return torch.special.ndtr((clean - _others(logits).amax(dim=-1)) * logits.shape[-1])


def expert_sums(logits: Float[Tensor, "M experts"], clean: Float[Tensor, "M experts"]) -> Float[Tensor, "2 experts"]:
    """Σ softmax(logits) and Σ `win_probability` over tokens."""
    return torch.stack([logits.softmax(dim=-1).sum(dim=0), win_probability(logits, clean).sum(dim=0)])


def gradients(
    logits: Float[Tensor, "M experts"], clean: Float[Tensor, "M experts"], grad: Float[Tensor, "2 experts"]
) -> tuple[Float[Tensor, "M experts"], Float[Tensor, "M experts"]]:
    """Those of both inputs. Competitors that tie share a load's gradient evenly, as in torch's amax."""
    experts = logits.shape[-1]
    importance, load = grad
    p = logits.softmax(dim=-1)
    others = _others(logits)
    best = others.amax(dim=-1)
    density = ((clean - best) * experts).square().mul(-0.5).exp() / math.sqrt(2 * math.pi)
    grad_clean = load * density * experts
    ties = (others == best.unsqueeze(-1)).to(logits.dtype)  # (M, expert whose load it is, competitor)
    grad_best = (grad_clean.unsqueeze(-1) * ties / ties.sum(dim=-1, keepdim=True).clamp_min(1)).sum(dim=-2)
    return p * (importance - (p * importance).sum(dim=-1, keepdim=True)) - grad_best, grad_clean


def _others(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts experts"]:
    """For each expert the logits, its own −∞."""
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.unsqueeze(-2).masked_fill(itself, float("-inf"))
