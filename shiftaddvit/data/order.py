"""Which image comes when: a pure function of seed, epoch and rank, so that a resumed run sees what the first would have."""

from dataclasses import dataclass

import numpy as np
import torch

from shiftaddvit.errors import UserError


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers that depend only on what they are for and on `numbers`, such as seed, epoch and step."""
    if min(numbers) < 0:
        raise UserError(f"seed, epoch and step {numbers}: must be 0 or more")
    return np.random.default_rng([int.from_bytes(purpose.encode()), *numbers, len(numbers)])


def current_shard() -> "Shard":
    """The shard of this process: its rank in the initialised process group, or all of the data when there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Shard()


@dataclass(frozen=True)
class Shard:
    """The part of the data that one process sees: every `world`-th image from `rank` on."""

    rank: int = 0
    """Number of this process."""
    world: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank={self.rank}: must be at least 0 and below the number of processes, {self.world}")


@dataclass(frozen=True)
class Blocks:
    """Images stored in blocks that are read as a whole, such as Parquet row groups."""

    starts: np.ndarray
    """First index of each block."""
    together: int
    """How many blocks a reader keeps in memory."""


def training_order(images: int, seed: int, epoch: int, shard: Shard, blocks: Blocks | None = None) -> np.ndarray:
    """The indices (images // world,) that this process sees in this epoch; every process sees the same number.

    With `blocks`, the blocks are shuffled and then the images within each `together` of them, so that each block is read once.
    """
    rng = generator("order", seed, epoch)
    if blocks is None:
        order = rng.permutation(images)
    else:
        ends = np.append(blocks.starts[1:], images)
        shuffled = rng.permutation(len(blocks.starts))
        groups = [shuffled[start : start + blocks.together] for start in range(0, len(shuffled), blocks.together)]
        runs = [np.concatenate([np.arange(blocks.starts[i], ends[i]) for i in group]) for group in groups]
        order = np.concatenate([rng.permutation(run) for run in runs])
    return order[shard.rank :: shard.world][: images // shard.world]


def evaluation_order(images: int, shard: Shard) -> np.ndarray:
    """The indices that this process sees: each image belongs to exactly one process, so counts may differ by one."""
    return np.arange(shard.rank, images, shard.world)
