"""Where a run is, and the randomness and the batches that belong there, so that a run which was stopped sees what an uninterrupted one does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Position:
    """Where a run is."""

    stage: int = 0
    """Index of the stage."""
    epoch: int = 0
    """Epoch inside the stage."""
    step: int = 0
    """Next batch of that epoch."""


def step_seed(seed: int, position: Position, rank: int = 0) -> int:
    """A seed of its own for every step of every stage and process."""
    value = seed
    for part in (position.stage, position.epoch, position.step, rank):
        value = (value * 1_000_003 + part + 1) % (2**63 - 25)
    return value


def batches_from(loader: Any, position: Position, seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches from `position.step` on. A loader without `start_at` is read up to there; what it draws from torch's random
    numbers, such as its order, depends on the position only."""
    # Stages must not see the same shuffles again.
    epoch = position.epoch + 10_000 * position.stage
    for part in (loader, getattr(loader, "sampler", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
            break
    start, step = position.step, 0
    if start and hasattr(loader, "start_at"):
        loader.start_at(start)
        step = start
    # Seeds below zero are for loaders, those from zero on for training steps.
    torch.manual_seed(step_seed(seed, Position(position.stage, position.epoch, -2), rank))
    batches = iter(loader)
    while True:
        torch.manual_seed(step_seed(seed, Position(position.stage, position.epoch, -3 - step), rank))
        batch = next(batches, None)
        if batch is None:
            return
        step += 1
        if step > start:
            yield batch
