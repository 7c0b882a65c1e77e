"""The latency-aware load-balancing loss and distillation (ShiftAddViT section 4.3)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.layers.router import Routing


def classification_loss(
    logits: Float[Tensor, "B classes"], targets: Tensor, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy in float32 with class indices (B,) or soft targets (B, classes)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def distillation_loss(
    logits: Float[Tensor, "B classes"], teacher: Float[Tensor, "B classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T²·KL(teacher ‖ student) at temperature T, in float32, mean over the batch."""
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def squared_coefficient_of_variation(x: Float[Tensor, "experts"]) -> Float[Tensor, ""]:
    """SCV(x) = (σ/μ)² with the population variance."""
    return x.var(correction=0) / x.mean().square().clamp_min(1e-20)


def win_probability(routing: Routing) -> Float[Tensor, "*tokens experts"]:
    """q_i(x) = Φ((z_i − thr_i)/σ_n): the probability that expert i wins when its own noise is drawn again; z are the clean logits,
    thr_i the best competing noisy logit, σ_n = 1/experts."""
    logits = routing.logits
    experts = logits.shape[-1]
    itself = torch.eye(experts, dtype=torch.bool, device=logits.device)
    competing = logits.unsqueeze(-2).masked_fill(itself, float("-inf")).amax(dim=-1)
    return torch.special.ndtr((routing.clean_logits - competing) * experts)


def balance_loss(
    records: Mapping[str, Routing], costs: Mapping[str, Float[Tensor, "experts"]]
) -> Float[Tensor, ""]:
    """L_imp + L_load, the mean over layers; zero for a model without mixtures.

    With α = cost/Σ cost (measured for each layer's shape, see `train.latency`): L_imp = SCV({α_i Σ_x p_i(x)}) and
    L_load = SCV({α_i Σ_x q_i(x)}), sums over all tokens of the batch. At the optimum expert i gets tokens ∝ 1/cost_i.
    """
    terms = []
    for name, routing in records.items():
        cost = costs[name].to(routing.probs.device)
        share = cost / cost.sum()
        importance = routing.probs.flatten(0, -2).sum(dim=0)
        load = win_probability(routing).flatten(0, -2).sum(dim=0)
        terms.append(squared_coefficient_of_variation(share * importance) + squared_coefficient_of_variation(share * load))
    return torch.stack(terms).mean() if terms else torch.zeros(())
