"""One update of the weights: forward, loss, backward, clipping, optimiser."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shiftaddvit.layers.router import Routing
from shiftaddvit.losses import balance_loss, classification_loss, distillation_loss

from .config import FinetuneConfig
from .latency import expert_costs
from .optim import clipped_parameters


class Update:
    """What a step computes, and nothing about which step it is.

    Args:
        model: as accelerate prepared it, compiled or not.
        plain: the same model, unwrapped.
        optimizer: as accelerate prepared it.
        routing: what `record_routing` fills at every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        optimizer: Any,
        routing: dict[str, Routing],
        config: FinetuneConfig,
        accelerator: Accelerator,
        teacher: nn.Module | None,
    ):
        self.model, self.optimizer, self.routing = model, optimizer, routing
        self.config, self.accelerator, self.teacher = config, accelerator, teacher
        self.costs: Mapping[str, Tensor] = expert_costs(plain)
        self.clipped = clipped_parameters(plain)

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """All of it; the loss, detached."""
        loss = self.loss(images, targets)
        self.learn(loss)
        return loss.detach()

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward: classification, distillation and balance."""
        config = self.config
        self.routing.clear()
        output = self.model(images)
        outputs = output if isinstance(output, tuple) else (output,)
        loss = sum(classification_loss(logits, targets, config.label_smoothing) for logits in outputs) / len(outputs)
        if self.teacher is not None and config.distill_weight:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(images)
            distilled = sum(distillation_loss(logits, taught, config.distill_temperature) for logits in outputs) / len(outputs)
            loss = (1 - config.distill_weight) * loss + config.distill_weight * distilled
        if self.routing and config.balance_weight:
            loss = loss + config.balance_weight * balance_loss(self.routing, self.costs)
        return loss

    def learn(self, loss: Tensor) -> None:
        """Backward, clipping, optimiser; gradients are gone afterwards."""
        self.accelerator.backward(loss)
        if self.config.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(self.clipped, self.config.clip_grad)
            self.skip_if_broken(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip_if_broken(self, norm: Tensor) -> None:
        """Let a fused optimiser leave the weights alone where a gradient is not finite, without waiting for the device, so that the layer
        can still be found at the next check. A gradient scaler does so by itself."""
        inner = unwrapped(self.optimizer)
        if self.accelerator.scaler is None and inner.param_groups[0].get("fused"):
            inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser itself, without accelerate around it."""
    return getattr(optimizer, "optimizer", optimizer)
