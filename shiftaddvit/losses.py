"""The latency-aware load-balancing loss and distillation (ShiftAddViT section 4.3)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.layers.router import Routing
from shiftaddvit.ops.expert_sums import expert_sums, reference


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


def squared_coefficient_of_variation(x: Float[Tensor, "*sums experts"]) -> Float[Tensor, "*sums"]:
    """SCV(x) = (σ/μ)² over experts with the population variance."""
    return x.var(dim=-1, correction=0) / x.mean(dim=-1).square().clamp_min(1e-20)


def win_probability(routing: Routing) -> Float[Tensor, "*tokens experts"]:
    """q_i(x) = Φ((z_i − thr_i)/σ_n): the probability that expert i wins when its own noise is drawn again; z are the clean logits,
    thr_i the best competing noisy logit, σ_n = 1/experts."""
    return reference.win_probability(routing.logits, routing.clean_logits)


def balance_loss(
    records: Mapping[str, Routing], costs: Mapping[str, Float[Tensor, "experts"]]
) -> Float[Tensor, ""]:
    """L_imp + L_load, the mean over layers; zero for a model without mixtures.

    With α = cost/Σ cost (measured for each layer's shape, see `train.latency`): L_imp = SCV({α_i Σ_x p_i(x)}) and
    L_load = SCV({α_i Σ_x q_i(x)}), sums over all tokens of the batch. At the optimum expert i gets tokens ∝ 1/cost_i.
    Layers of equally many experts are computed together from their sums on.
    """
    by_experts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for name, routing in records.items():
        sums = expert_sums(routing.logits.float(), routing.clean_logits.float())
        by_experts.setdefault(sums.shape[-1], []).append((sums, costs[name].to(sums.device)))
    terms = []
    for layers in by_experts.values():
        sums, cost = (torch.stack(tensors) for tensors in zip(*layers, strict=True))  # (layers, 2, experts) and (layers, experts)
        share = cost / cost.sum(dim=-1, keepdim=True)
        terms.append(squared_coefficient_of_variation(share.unsqueeze(1) * sums).sum(dim=-1))
    return torch.cat(terms).mean() if terms else torch.zeros(())
