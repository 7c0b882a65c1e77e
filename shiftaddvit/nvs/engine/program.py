"""A lowered GNT: its blocks in order, and what a chunk of rays goes through."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.engine.program import Launch

from .ray_steps import Color, FusedRay, FusedWeights, ModuleWeights, SteppedRay
from .steps import LookUp, Query, Target, Views


@dataclass(frozen=True)
class Block:
    """A view transformer and a ray transformer."""

    views: Views
    """What the views say about each point."""
    query: Query | None
    """On even blocks."""
    ray: FusedRay | SteppedRay
    """What the points say to each other."""


@dataclass(frozen=True)
class RayProgram:
    """A lowered GNT."""

    look_up: LookUp
    """From points to what views see."""
    blocks: tuple[Block, ...]
    """In order."""
    weights: FusedWeights | ModuleWeights
    """Depth."""
    color: Color
    """RGB."""
    dtype: torch.dtype
    """Of activations and matrices."""
    feature_channels: int
    """Of the features it reads, padded."""
    notes: tuple[str, ...] = ()
    """What preparing the weights had to give up."""

    @torch.no_grad()
    def run(self, target: Target, launch: Launch = Launch()) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R"]]:
        """Colours and depths of the rays, float32."""
        x, geometry, q = self.look_up.run(target, launch)
        rays, samples = len(target.origin), len(target.depths)
        for block in self.blocks:
            q = block.views.run(q, x, geometry, launch)
            if block.query is not None:
                q = block.query.run(q, target, launch)
            before = q.view(rays, samples, -1)
            q = block.ray.run(before, launch).flatten(0, 1)
        weights = self.weights.run(before, launch)
        return self.color.run(q.view(rays, samples, -1), launch), weights @ target.depths

    @property
    def unfused(self) -> tuple[str, ...]:
        """Names of what runs as ordinary torch operations."""
        return tuple(name for block in self.blocks for part in (block.views, block.ray) for name in part.unfused)
