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


@torch.no_grad()
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
    _, bits, _ = start.shape
    remaining = bits * targets.float()
    directions = start.detach().clone().float()
    features = features.detach().float()
    for bit in range(bits):
        initial = directions[:, bit]
        trained = _descend(features, remaining, initial, bits, steps, learning_rate, momentum)
        before, after = (_signs(_project(features, a)) for a in (initial, trained))
        better = _agreement_loss(after, remaining, bits) < _agreement_loss(before, remaining, bits)
        if better:
            directions[:, bit] = trained
        signs = after if better else before
        remaining = remaining - signs.unsqueeze(-1) * signs.unsqueeze(-2)
    return directions


def _descend(
    features: Tensor, targets: Tensor, start: Float[Tensor, "h m"], bits: int, steps: int, learning_rate: float, momentum: float
) -> Float[Tensor, "h m"]:
    """SGD with Nesterov momentum on the agreement loss of the soft bit; its gradient is written out, which is 50 times faster here
    than automatic differentiation: ∂loss/∂y = −(S + Sᵀ) y / (B h N r), ∂y/∂(κa) = (1 − y²)/2."""
    batch, heads, tokens, _ = features.shape
    symmetric = targets + targets.transpose(-2, -1)
    scale = -0.5 / (batch * heads * tokens * bits)
    direction, velocity = start.clone(), torch.zeros_like(start)
    by_head = features.transpose(0, 1).flatten(1, 2)  # (h, B·N, m)
    for _ in range(steps):
        soft = torch.tanh(_project(features, direction) / 2)  # 2·sigmoid(κa) − 1
        slope = (symmetric @ soft.unsqueeze(-1)).squeeze(-1) * (1 - soft.square()) * scale
        gradient = (slope.transpose(0, 1).flatten(1).unsqueeze(1) @ by_head).squeeze(1)
        velocity = momentum * velocity + gradient
        direction = direction - learning_rate * (gradient + momentum * velocity)
    return direction


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
    return (features @ direction.unsqueeze(-1)).squeeze(-1)


def _signs(projected: Tensor) -> Tensor:
    return torch.where(projected > 0, 1.0, -1.0)


def _agreement_loss(y: Float[Tensor, "B h N"], targets: Float[Tensor, "B h N N"], bits: int) -> Tensor:
    return -((targets @ y.unsqueeze(-1)).squeeze(-1) * y).sum(-1).mean() / (y.shape[-1] * bits)
