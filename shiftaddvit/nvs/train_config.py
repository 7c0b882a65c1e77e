"""How a view model trains."""

import math
from dataclasses import dataclass
from typing import Literal

from shiftaddvit.errors import UserError


@dataclass(frozen=True)
class NvsTrainConfig:
    """How a view model trains. The defaults suit a single scene; `NvsTrainConfig.published()` is GNT's recipe."""

    steps: int = 20_000
    """Optimisation steps, one target view each."""
    minutes: float | None = None
    """Stop after so long if the steps take longer; the learning rate then follows the clock."""
    rays: int = 2048
    """Pixels of the target view in a step."""
    lr: float = 5e-4
    """Of everything but the feature net."""
    lr_features: float = 1e-3
    """Of the feature net."""
    schedule: Literal["cosine", "halving"] = "cosine"
    """`cosine` to 2 % of the learning rate at the end; `halving` every 50,000 steps, as published."""
    warmup_steps: int = 200
    """Linear warm-up."""
    shift_lr_scale: float = 10.0
    """Learning rate of shift exponents and signs relative to `lr`: they live in log2 units."""
    balance_weight: float = 0.01
    """λ of the latency-aware balance loss, for models with mixtures."""
    measure_latency: bool = True
    """Measure both experts of each mixture on this device for the balance loss; otherwise they count as equal."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 leaves it."""
    source_jitter: int = 2
    """The number of source views varies by so many from step to step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16; geometry, encodings, softmax and norms in float32."""
    compile: bool = False
    """torch.compile the transformer and the feature net (not with mixtures, whose routing is recorded as it happens)."""
    cuda_graph: bool = True
    """On a GPU, record a step once for every number of source views and replay it, without the time that launching takes."""
    seed: int = 0
    """Of everything random: a resumed run equals one that never stopped, on the same CPU."""
    check_every: int = 1000
    """Steps between looks at the loss and at held-out pixels."""
    checkpoint_minutes: float = 2.0
    """Longest time between checkpoints."""

    def __post_init__(self) -> None:
        for field in ("steps", "rays", "check_every"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)}; allowed: 1 and more")
        for field in ("lr", "lr_features", "shift_lr_scale"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"{field} = {getattr(self, field)}; allowed: a positive number")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"minutes = {self.minutes}; allowed: a positive number")
        if self.schedule not in ("cosine", "halving"):
            raise UserError(f"schedule = {self.schedule!r}; allowed: 'cosine', 'halving'")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision = {self.precision!r}; allowed: 'fp32', 'bf16'")

    @classmethod
    def published(cls, steps: int = 250_000) -> "NvsTrainConfig":
        """GNT's own: Adam at 5e-4 and 1e-3, halved every 50,000 steps; no clipping, no warm-up. Fine-tuning takes 60,000 steps."""
        return cls(steps=steps, rays=4096, schedule="halving", warmup_steps=0, clip_grad=0.0)

    def lr_factor(self, step: int, progress: float) -> float:
        """Of the learning rate; `progress` from 0 to 1 by steps or by the clock, whichever is further."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "halving":
            return warm * 0.5 ** (step / 50_000)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
