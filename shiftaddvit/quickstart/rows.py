"""One row of the quickstart's table: convert the embedded model, fine-tune it in two stages, evaluate, save packed, load again."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import Evaluation, evaluate
from shiftaddvit.model_card import ModelFacts
from shiftaddvit.reparam import recipes, reparameterize
from shiftaddvit.serialization import load, round_dense, save
from shiftaddvit.train import FinetuneConfig, StageConfig, finetune
from shiftaddvit.train.run_folder import CHECKPOINT

from .assets import ARCHITECTURE, ARCHITECTURE_ARGS, DATA, SIDE, EmbeddedImages, load_dense, test_loader, training_loader
from .multiplications import multiplications, token_shares
from .records import write_dispatch, write_energy

ROWS = {
    "MSA": "msa",
    "linear": "ours-quant-linear",
    "+ add": "ours-quant-add",
    "+ shift (both)": "ours-quant-shift",
    "+ MoE (both)": "ours-quant-moe",
}
"""What the table calls a row, and its recipe."""


@dataclass(frozen=True)
class Budget:
    """How long each row trains; the defaults fill two minutes of two cores."""

    attention_epochs: int = 1
    """Of the first stage; a row that skips it gives its epochs to the other."""
    linear_epochs: int = 1
    """Of the second stage."""
    train_images: int = 6000
    """Embedded training images used, the first ones."""
    test_images: int = 2000
    """Embedded test images used, the first ones."""
    batch: int = 100
    """Images a step."""
    lr: float = 2e-3
    """Peak learning rate at a batch of 512, for both stages."""

    def __post_init__(self) -> None:
        if not 0 < self.batch <= self.train_images <= 6000 or not 0 < self.test_images <= 2000:
            raise UserError(f"the quickstart has 6000 training and 2000 test images, got {self}")

    def config(self, seed: int) -> FinetuneConfig:
        """The two stages. Experts count as equally fast: the CPU's reference path says nothing about a deployed model's."""
        stages = (
            StageConfig("attention", self.attention_epochs, lr=self.lr, warmup_epochs=0.2),
            StageConfig("all", self.linear_epochs, lr=self.lr, warmup_epochs=0.2),
        )
        return FinetuneConfig(stages=stages, seed=seed, evaluate_every=0, cost="equal", checkpoint_minutes=60, log_every=10)


@dataclass(frozen=True)
class RowResult:
    """What the table shows of one row; everything measured in this run."""

    name: str
    """What the table calls it."""
    recipe: str | None
    """Its recipe; None for the dense model."""
    evaluation: Evaluation
    """On the test images."""
    shift_share: float | None
    """Share of (token, linear layer) pairs that a shift computes: 1 without a choice, None where nothing shifts."""
    multiplications: float
    """Of one image."""
    dense_multiplications: float
    """Of one image in the dense model."""
    bytes: int
    """Size of the packed file; of the float32 weights for the dense model."""
    dense_bytes: int
    """Size of the dense model's float32 weights."""
    largest_difference: float | None
    """Between logits of the model and of its file, loaded again; None for the dense model."""
    seconds: float
    """For everything."""
    file: Path | None
    """The packed file."""

    @property
    def removed(self) -> float:
        """Share of the dense model's multiplications that are gone; negative if there are more."""
        return 1 - self.multiplications / self.dense_multiplications

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("evaluation", "file")}
        return values | {"removed": self.removed, "file": self.file and self.file.name, "evaluation": self.evaluation.to_json()}


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    images: EmbeddedImages
    """The data."""
    budget: Budget
    """How long a row trains."""
    folder: Path
    """Where packed files go."""
    device: torch.device
    """Where everything runs."""
    seed: int
    """Of everything random."""
    show: bool = True
    """Whether to show progress."""

    def training(self) -> ResidentLoader:
        """The training images of the budget."""
        count = self.budget.train_images
        data = self.images.train_images[:count], self.images.train_labels[:count]
        return training_loader(*data, self.budget.batch, self.seed, self.device)

    def testing(self) -> ResidentLoader:
        """The test images of the budget."""
        count = self.budget.test_images
        return test_loader(self.images.test_images[:count], self.images.test_labels[:count], self.device)

    def to_json(self) -> dict[str, Any]:
        """What the rows depended on."""
        model = {"name": ARCHITECTURE, "args": ARCHITECTURE_ARGS}
        return {"model": model, "image_size": [SIDE, SIDE], "data": DATA, "budget": asdict(self.budget), "finetune": asdict(self.budget.config(self.seed)), "seed": self.seed}


def dense_row(setting: Setting) -> RowResult:
    """The embedded model as it is."""
    start = time.monotonic()
    model = load_dense(setting.device)
    mults = multiplications(model, SIDE, {})
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    evaluation = evaluate(model, setting.testing(), progress=False)
    write_energy(model, None, {}, setting.folder / "energy" / "dense.json")
    return RowResult("dense", None, evaluation, None, mults, mults, size, size, None, time.monotonic() - start, None)


def converted_row(name: str, dense: RowResult, setting: Setting) -> RowResult:
    """The row `name` of `ROWS`, from the embedded model."""
    start = time.monotonic()
    recipe = recipes[ROWS[name]]
    torch.manual_seed(setting.seed)
    model = reparameterize(load_dense(setting.device), recipe)
    run = setting.folder / "training" / recipe.name
    finetune(model, setting.training(), None, setting.budget.config(setting.seed), output=run, overwrite=True, show=setting.show)
    (run / CHECKPOINT).unlink()  # the run is over: nothing goes on from here
    round_dense(model)
    evaluation = evaluate(model, setting.testing(), progress=False)
    shares, shifted = token_shares(model, setting.testing(), setting.device)
    energy = write_energy(model, recipe.name, shares, setting.folder / "energy" / f"{recipe.name}.json")
    if shares:
        write_dispatch(model, setting.images, setting.folder / f"dispatch-{recipe.name}.json", setting.device)
    facts = ModelFacts.of_evaluation(
        evaluation.to_json(), data=DATA, energy=energy, license="apache-2.0", training=f"two short stages on {setting.budget.train_images:,} images, seed {setting.seed}",
        base="a small PVTv2 that ships with shiftaddvit, pre-trained on Fashion-MNIST",
    )  # fmt: skip
    written = save(model, setting.folder / f"{recipe.name}.safetensors", packed=True, facts=facts)
    again = load(written.path, setting.device)
    return RowResult(
        name, recipe.name, evaluation, 1.0 if recipe.mlp == "shift" else shifted, multiplications(model, SIDE, shares),
        dense.dense_multiplications, written.bytes, dense.dense_bytes, logit_difference(model, again, setting), time.monotonic() - start,
        Path(written.path),
    )  # fmt: skip


@torch.no_grad()
def logit_difference(first: nn.Module, second: nn.Module, setting: Setting) -> float:
    """The largest difference of two models' logits on the first batch of test images."""
    images, _ = next(iter(setting.testing()))
    return float((first.eval()(images) - second.eval()(images)).abs().max())


def claim_device(name: str) -> torch.device:
    """Let this process train on `cpu` or `cuda` only, whatever else it has. UserError if that device is not to be had."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no usable GPU here; leave the option out to use the CPU")
    state = PartialState(cpu=name == "cpu")
    if state.device.type != name:
        raise UserError(f"--device {name}: this process already trains on {state.device.type}")
    return torch.device(name)
