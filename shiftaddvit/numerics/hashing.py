"""Kernel-supervised hashing (KSH; Ecoformer, as used in ShiftAddViT section 4.1). Everything here runs in float32.

A token x is described by its Gaussian kernel values to m anchor tokens, κ(x)_a = exp(−‖x−a‖²/2σ) − μ, and r learned directions A turn
that into r bits. The bits are trained, once and explicitly, so that tokens which attend to each other share them.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(x: Float[Tensor, "B h N d"], anchors: Float[Tensor, "B1 h m d"]) -> Float[Tensor, "B h N m"]:
    """‖x − a‖² from ‖x‖² + ‖a‖² − 2 x·a (never below zero), so that no (N, m, d) difference is stored."""
    squares = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ anchors.transpose(-2, -1)).clamp_min(0)


def kernel_features(x: Float[Tensor, "B h N d"], anchors: Float[Tensor, "B1 h m d"]) -> Float[Tensor, "B h N m"]:
    """κ before centring: exp(−‖x−a‖²/(2σ)), σ the mean squared distance over (N, m) of each sample and head."""
    distances = squared_distances(x.float(), anchors.float())
    sigma = distances.mean(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return torch.exp(-distances / (2 * sigma))


def similarity_targets(
    q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], top: int = 10
) -> Float[Tensor, "B h N N"]:
    """+1 at each row's `top` largest q·k, −1 at its `top` smallest, 0 elsewhere. With fewer than 2·top tokens, half of them each."""
    scores = q.float() @ k.float().transpose(-2, -1)
    top = max(1, min(top, scores.shape[-1] // 2))
    targets = torch.zeros_like(scores)
    targets.scatter_(-1, scores.topk(top, dim=-1, largest=False).indices, -1.0)
    return targets.scatter_(-1, scores.topk(top, dim=-1).indices, 1.0)


def train_hash(
    features: Float[Tensor, "B h N m"],
    targets: Float[Tensor, "B h N N"],
    start: Float[Tensor, "h r m"],
    steps: int = 100,
    learning_rate: float = 5e-4,
    momentum: float = 0.9,
) -> Float[Tensor, "h r m"]:
    """Learn the r directions one bit at a time, each against what the bits before it left unexplained.

    For bit t: y = 2·sigmoid(κ a) − 1, loss = −mean(yᵀ S y)/(N r), SGD with Nesterov momentum; the trained direction is kept only if the
    loss with hard signs fell; then S ← S − y yᵀ. `features` are centred κ. Deterministic given `start`.
    """
    heads, bits, _ = start.shape
    tokens = features.shape[-2]
    remaining = bits * targets.float()
    directions = start.detach().clone().float()
    features = features.detach().float()
    for bit in range(bits):
        initial = directions[:, bit]
        trained = initial.clone().requires_grad_(True)
        optimizer = torch.optim.SGD([trained], lr=learning_rate, momentum=momentum, nesterov=True)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                soft = 2 * torch.sigmoid(_project(features, trained)) - 1
                _agreement_loss(soft, remaining, tokens, bits).backward()
                optimizer.step()
        with torch.no_grad():
            before, after = (_signs(_project(features, a)) for a in (initial, trained))
            better = _agreement_loss(after, remaining, tokens, bits) < _agreement_loss(before, remaining, tokens, bits)
            if better:
                directions[:, bit] = trained
            signs = after if better else before
            remaining = remaining - signs.unsqueeze(-1) * signs.unsqueeze(-2)
    return directions


def hash_codes(
    features: Float[Tensor, "B h N m"], directions: Float[Tensor, "h r m"], plus_minus: bool = False
) -> Float[Tensor, "B h N r"]:
    """1[κ(x) Aᵀ > 0] in {0, 1} (ShiftAddViT) or ±1 (Ecoformer), with the gradient of sigmoid(κ Aᵀ) (times 2 for ±1) in its place."""
    projected = features @ directions.transpose(-2, -1)
    low, scale = (-1.0, 2.0) if plus_minus else (0.0, 1.0)
    hard = torch.where(projected > 0, 1.0, low).to(projected.dtype)
    soft = scale * torch.sigmoid(projected) + low
    return hard + (soft - soft.detach())


def _project(features: Tensor, direction: Float[Tensor, "h m"]) -> Float[Tensor, "B h N"]:
    return torch.einsum("bhnm,hm->bhn", features, direction)


def _signs(projected: Tensor) -> Tensor:
    return torch.where(projected > 0, 1.0, -1.0)


def _agreement_loss(y: Tensor, targets: Tensor, tokens: int, bits: int) -> Tensor:
    return -torch.einsum("bhi,bhij,bhj->bh", y, targets, y).mean() / (tokens * bits)
