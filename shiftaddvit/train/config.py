"""What a training run is: frozen, written to the run's folder, and compared on resume."""

from dataclasses import dataclass
from typing import Literal

from shiftaddvit.errors import UserError

from .compiling import Compile, check_compile


@dataclass(frozen=True)
class StageConfig:
    """One stage of fine-tuning."""

    primitives: Literal["dense", "attention", "all"]
    """What is converted while it runs: `attention` puts the linears back to multiplications, `all` trains the model as its recipe says;
    `dense` trains a model that was never converted."""
    epochs: int
    """Passes over the training data."""
    lr: float = 1e-3
    """Peak learning rate at a total batch of 512; scaled by batch/512."""
    warmup_epochs: float = 1.0
    """Linear warm-up from `warmup_lr`; never longer than a quarter of the stage (`warmup_steps`)."""
    warmup_lr: float = 1e-6
    """Where the warm-up starts (at a batch of 512)."""
    min_lr: float = 1e-6
    """Where the cosine ends (at a batch of 512)."""
    compile: Compile | None = None
    """What to compile in this stage; None does as the run does."""

    def __post_init__(self) -> None:
        if self.primitives not in ("dense", "attention", "all"):
            raise UserError(f"stage primitives must be 'dense', 'attention' or 'all', got {self.primitives!r}")
        if self.epochs < 1 or self.lr <= 0:
            raise UserError(f"a stage needs at least one epoch and a positive lr, got epochs={self.epochs}, lr={self.lr}")
        check_compile(self.compile)

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up, at `steps` an epoch: a stage of an epoch or two is not to spend all its time far below its peak."""
        return min(int(self.warmup_epochs * steps), self.epochs * steps // 4)

    @property
    def label(self) -> str:
        return {"dense": "dense", "attention": "attention", "all": "linears"}[self.primitives]


@dataclass(frozen=True)
class FinetuneConfig:
    """The two stages and how they train. `FinetuneConfig.published()` is the paper's recipe for ImageNet."""

    stages: tuple[StageConfig, ...] = (StageConfig("attention", 10), StageConfig("all", 10))
    """Run in order; a stage that would change nothing for the model's recipe is skipped and its epochs given to the next."""
    optimizer: str = "adamw"
    """Any of timm's optimisers."""
    weight_decay: float = 0.05
    """On matrices only: never on biases, norms, routers, token convolutions, exponents and signs."""
    shift_lr_scale: float = 10.0
    """Learning rate of DeepShift-PS exponents and signs relative to `lr`: they live in log2 units."""
    adder_lr_scale: float = 1.0
    """Learning rate of adder weights relative to `lr`."""
    clip_grad: float | None = 1.0
    """Largest gradient norm, adder weights left out; None leaves it."""
    label_smoothing: float = 0.1
    """For targets that are class indices; soft targets (mixup) carry their own."""
    balance_weight: float = 0.01
    """λ of the latency-aware balance loss."""
    cost: Literal["latency", "energy", "equal"] = "latency"
    """What the balance loss weighs experts by: their latency measured on this device, their energy on the Eyeriss model, or nothing."""
    distill_weight: float = 0.0
    """Share of the loss that comes from the dense teacher; 0 is none."""
    distill_temperature: float = 1.0
    """Temperature of that distillation."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which then is the result; None is none."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision, by accelerate."""
    compile: Compile = False
    """torch.compile the model, or "attention": the formulas of converted attention alone, for mixtures, which take minutes to compile."""
    cuda_graph: bool = True
    """On one GPU, record a step once and replay it: the same numbers, without the time that launching takes. Where a step cannot be
    recorded it runs as it is, and the log says why."""
    channels_last: bool = False
    """Keep convolution inputs in channels-last memory order."""
    seed: int = 0
    """Of everything random: two runs with one seed on the same CPU are equal."""
    log_every: int = 50
    """Steps between log lines; on a GPU also between checks for a loss that is not finite."""
    checkpoint_minutes: float = 5.0
    """Longest time between checkpoints; every stage's end has one too."""
    evaluate_every: int = 1
    """Epochs between evaluations; 0 evaluates at the end only."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the `train` extra)."""

    def __post_init__(self) -> None:
        if self.precision not in ("no", "fp16", "bf16"):
            raise UserError(f"precision must be 'no', 'fp16' or 'bf16', got {self.precision!r}")
        if self.cost not in ("latency", "energy", "equal"):
            raise UserError(f"cost must be 'latency', 'energy' or 'equal', got {self.cost!r}")
        check_compile(self.compile)
        if not self.stages:
            raise UserError("a run needs at least one stage")
        if not 0 <= self.distill_weight <= 1:
            raise UserError(f"distill_weight must be from 0 to 1, got {self.distill_weight}")

    @classmethod
    def published(cls) -> "FinetuneConfig":
        """The authors' ImageNet recipe (8 GPUs × 32), less its first stage to MSA; hundreds of GPU hours."""
        attention = StageConfig("attention", 100, lr=5e-5, warmup_epochs=5, warmup_lr=1e-7, min_lr=1e-6)
        linears = StageConfig("all", 100, lr=1e-5, warmup_epochs=5, warmup_lr=5e-8, min_lr=5e-7)
        return cls(stages=(attention, linears), shift_lr_scale=1.0, precision="fp16", clip_grad=None)


def pretraining(epochs: int, lr: float = 1e-3, seed: int = 0, ema_decay: float | None = 0.9998) -> FinetuneConfig:
    """Training a dense model from random weights."""
    stage = StageConfig("dense", epochs, lr=lr, warmup_epochs=min(10, max(1, epochs // 20)))
    return FinetuneConfig(stages=(stage,), ema_decay=ema_decay, seed=seed)


def config_from_dict(values: dict) -> FinetuneConfig:
    """The inverse of `dataclasses.asdict`."""
    values = dict(values)
    values["stages"] = tuple(StageConfig(**stage) for stage in values["stages"])
    return FinetuneConfig(**values)
