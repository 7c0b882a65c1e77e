"""One optimisation step: as many rays at once as the memory holds, gradients added up, the feature net run once."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.router import Routing
from shiftaddvit.losses import balance_loss
from shiftaddvit.train.latency import measure_expert_latency, set_expert_costs

from .batch import Batch
from .sources import RayColors, Rays, Sources


class Balance(NamedTuple):
    """What the balance loss of a model with mixtures needs."""

    records: Mapping[str, Routing]
    """Filled at every forward by `record_routing`."""
    costs: Mapping[str, Tensor]
    """Relative cost of every expert, by mixture."""
    weight: float
    """λ."""


def precision_context(device: torch.device | str, precision: str) -> AbstractContextManager:
    """bfloat16 (or, for rendering, float16) where safe (autocast; geometry, encodings, softmax and norms stay float32), or nothing."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if half is not None:
        return torch.autocast(torch.device(device).type, dtype=half)
    return nullcontext()


def add_gradients(
    model: nn.Module, batch: Batch, precision: str, balance: Balance | None, chunk: int, seen: Callable[[int], bool] | None = None
) -> Float[Tensor, ""]:
    """Add the gradients of the batch's mean squared error (and balance loss) to the parameters; returns the squared error, detached.

    The feature net runs once and its gradient is gathered over the chunks. Whoever seeds before can repeat a step that ran out of memory
    with a smaller chunk. `seen` is told the number of rays done after every chunk; where it says so the step ends there, and error and
    gradients are those of the rays done.
    """
    device = batch.target.device
    sources, features = batch.sources, None
    if sources is not None:
        with precision_context(device, precision):
            features = model.encode(sources.images)
        if features is not None:
            sources = sources._replace(features=features.detach().requires_grad_())
    total = torch.zeros((), device=device)
    rays = len(batch.target)
    done = rays
    for start in range(0, rays, chunk):
        target = batch.target[start : start + chunk]
        with precision_context(device, precision):
            colors = model(batch.rays.chunk(start, chunk), sources)
        share = len(target) / rays
        loss = squared_error(colors, target)
        if balance is not None:
            loss = loss + balance.weight * balance_loss(balance.records, balance.costs)
        total += share * (colors.rgb.detach() - target).square().mean()
        (share * loss).backward()
        if seen is not None and seen(min(start + chunk, rays)):
            done = min(start + chunk, rays)
            break
    if features is not None and sources.features.grad is not None:
        features.backward(sources.features.grad.to(features.dtype))
    if done < rays:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= rays / done
        total *= rays / done
    return total


def squared_error(colors: RayColors, target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Of the colour, and of the coarse pass where there is one."""
    loss = (colors.rgb - target).square().mean()
    return loss if colors.coarse is None else loss + (colors.coarse - target).square().mean()


class _Asked(nn.Module):
    """A view model whose question is fixed, for code that calls a model with one tensor."""

    def __init__(self, model: nn.Module, rays: Rays, sources: Sources):
        super().__init__()
        self.model, self.rays, self.sources = model, rays, sources

    def forward(self, _: Tensor) -> RayColors:
        return self.model(self.rays, self.sources)


def measure_costs(model: nn.Module, batch: Batch, rays: int = 256) -> None:
    """Time both experts of every mixture on this device, at the shape that `rays` rays give them, and store the costs in the mixtures."""
    with torch.no_grad():
        sources = batch.sources._replace(features=model.encode(batch.sources.images))
    asked = _Asked(model, batch.rays.chunk(0, rays), sources)
    set_expert_costs(asked, measure_expert_latency(asked, batch.target))
