"""A small model, its data and how it trains in two stages."""

import numpy as np
import torch
from torch import nn

import shiftaddvit
from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.reparam import Recipe, reparameterize
from shiftaddvit.train import FinetuneConfig, StageConfig

torch.set_num_threads(1)  # here, because scripts that tests start import it too
ARGS = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "drop_path_rate": 0.1}
TWO_STAGES = FinetuneConfig(
    stages=(StageConfig("attention", 2, warmup_epochs=0.5), StageConfig("all", 2, warmup_epochs=0.5)),
    ema_decay=0.9, cost="equal", seed=3,
)  # fmt: skip
STEPS = 3
"""Batches an epoch of `loader`."""


def model(recipe: Recipe | str | None = "ours-quant-moe") -> nn.Module:
    torch.manual_seed(0)
    built = shiftaddvit.create_model("vit_tiny_patch16_224", ARGS)
    return built if recipe is None else reparameterize(built, recipe)


def loader(train: bool = True, **changes) -> ResidentLoader:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (13, 32, 32, 3), dtype=np.uint8), np.arange(13) % 3
    augment = AugmentConfig(rand_augment=None)
    return ResidentLoader(images, labels, train=train, batch_size=4, augment=augment, seed=1, classes=3, **changes)


class Stopping:
    """A loader during which something happens before global batch `at`."""

    def __init__(self, at: int, happens):
        self.inner, self.at, self.happens, self.seen, self.batch_size = loader(), at, happens, 0, 4

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch)

    def start_at(self, step: int) -> None:
        self.inner.start_at(step)

    def __iter__(self):
        for images, targets in self.inner:
            if self.seen == self.at:
                images = self.happens(images)
            self.seen += 1
            yield images, targets


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
