"""One optimisation step: as many rays at once as the memory holds, gradients added up, the feature net run once."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.router import Routing, record_routing
from shiftaddvit.losses import balance_loss
from shiftaddvit.train.latency import expert_costs

from .batch import Batch
from .sources import RayColors


def precision_context(device: torch.device | str, precision: str) -> AbstractContextManager:
    """bfloat16 where safe (autocast; geometry, encodings, softmax and norms stay float32), or nothing."""
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def add_gradients(model: nn.Module, batch: Batch, seed: int, precision: str, balance_weight: float, chunk: int) -> Float[Tensor, ""]:
    """Add the gradients of the batch's mean squared error (and balance loss) to the parameters; returns the squared error, detached.

    The feature net runs once and its gradient is gathered over the chunks. Everything random follows from `seed`, so a step that ran
    out of memory can be repeated with a smaller chunk.
    """
    torch.manual_seed(seed)
    device = batch.target.device
    sources, features = batch.sources, None
    if sources is not None:
        with precision_context(device, precision):
            features = model.encode(sources.images)
        if features is not None:
            sources = sources._replace(features=features.detach().requires_grad_())
    total = torch.zeros((), device=device)
    rays = len(batch.target)
    costs = expert_costs(model) if balance_weight else {}
    for start in range(0, rays, chunk):
        target = batch.target[start : start + chunk]
        with record_routing(model) if costs else nullcontext({}) as records, precision_context(device, precision):
            colors = model(batch.rays.chunk(start, chunk), sources)
        share = len(target) / rays
        loss = squared_error(colors, target)
        total += share * (colors.rgb.detach() - target).square().mean()
        (share * (loss + _balance(records, costs, balance_weight))).backward()
    if features is not None and sources.features.grad is not None:
        features.backward(sources.features.grad.to(features.dtype))
    return total


def squared_error(colors: RayColors, target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Of the colour, and of the coarse pass where there is one."""
    loss = (colors.rgb - target).square().mean()
    return loss if colors.coarse is None else loss + (colors.coarse - target).square().mean()


def _balance(records: Mapping[str, Routing], costs: Mapping[str, Tensor], weight: float) -> Tensor | float:
    return weight * balance_loss(records, costs) if costs else 0.0
