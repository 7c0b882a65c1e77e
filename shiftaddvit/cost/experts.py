"""How the tokens of each mixture are divided: measured over images, forced, or assumed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.router import record_routing

from .operations import Expert, Mixture
from .result import ExpertTokens


@dataclass(frozen=True)
class Shares:
    """The division of tokens in every mixture."""

    by_mixture: Mapping[str, tuple[float, ...]]
    """Share of the tokens of each expert; they sum to one."""
    source: str
    """`measured over n images`, `forced` or `assumed`."""
    per_image: Mapping[str, NDArray[np.float64]] | None = None
    """Measured shares, (images, experts), by mixture."""

    def of(self, experts: Sequence[Expert]) -> float:
        """Share of the tokens that reach an operation inside these experts."""
        share = 1.0
        for expert in experts:
            share *= self.by_mixture[expert.mixture][expert.index]
        return share

    def of_images(self, experts: Sequence[Expert]) -> NDArray[np.float64]:
        """The same for each measured image."""
        share = np.ones(1)
        for expert in experts:
            share = share * self.per_image[expert.mixture][:, expert.index]
        return share

    def tokens(self, mixture: Mixture, images: int) -> ExpertTokens:
        """Tokens an image for each expert of one mixture."""
        shares, total = self.by_mixture[mixture.name], mixture.tokens / images
        sd = None
        if self.per_image is not None and len(self.per_image[mixture.name]) > 1:
            sd = tuple(float(x) for x in self.per_image[mixture.name].std(axis=0, ddof=1) * total)
        return ExpertTokens(mixture.name, mixture.primitives, shares, tuple(share * total for share in shares), sd)


def forced(mixtures: Iterable[Mixture], shift_share: float, source: str = "forced") -> Shares:
    """`shift_share` of every mixture's tokens to its shift experts, the rest to the others, evenly among several. A mixture of one kind of
    expert divides evenly."""
    if not 0 <= shift_share <= 1:
        raise UserError(f"shift share must be from 0 to 1, got {shift_share}")
    shares = {}
    for mixture in mixtures:
        shifts = mixture.primitives.count("shift")
        others = len(mixture.primitives) - shifts
        if not shifts or not others:
            shares[mixture.name] = (1 / len(mixture.primitives),) * len(mixture.primitives)
        else:
            shares[mixture.name] = tuple(
                shift_share / shifts if primitive == "shift" else (1 - shift_share) / others for primitive in mixture.primitives
            )
    return Shares(shares, source)


@torch.no_grad()
def measured(model: nn.Module, images: Tensor | Iterable[Tensor | Sequence[Tensor]]) -> Shares:
    """Route real images: a (B, 3, H, W) tensor, or batches of them (a data loader; labels are ignored)."""
    counts: dict[str, list[Tensor]] = {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with record_routing(model) as records:
            for batch in [images] if isinstance(images, Tensor) else images:
                batch = batch if isinstance(batch, Tensor) else batch[0]
                model(batch.to(device))
                for name, routing in records.items():
                    index = routing.index.reshape(len(batch), -1)
                    experts = routing.logits.shape[-1]
                    counts.setdefault(name, []).append(torch.stack([(index == e).sum(dim=1) for e in range(experts)], dim=1).cpu())
                records.clear()
    finally:
        for module, mode in training.items():
            module.training = mode
    if not counts:
        return Shares({}, "no mixtures")
    per_image = {name: torch.cat(rows).double().numpy() for name, rows in counts.items()}
    per_image = {name: rows / rows.sum(axis=1, keepdims=True) for name, rows in per_image.items()}
    means = {name: tuple(float(x) for x in rows.mean(axis=0)) for name, rows in per_image.items()}
    images_seen = len(next(iter(per_image.values())))
    return Shares(means, f"measured over {images_seen} images", per_image)


def divide(tokens: int, shares: Sequence[float]) -> list[int]:
    """Whole tokens for each expert: every count is that of a sum of shares rounded, so that they add up."""
    left = [round(sum(shares[first:]) * tokens) for first in range(len(shares))]
    left[0] = tokens
    return [a - b for a, b in zip(left, [*left[1:], 0], strict=True)]
