"""Patch embeddings and spatial reductions as convolutions over tokens where they lie."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.ops.patch_embed import unflatten_weight

from ..embed import EmbedStep
from .linear import normalised
from .onednn import convolve_tokens, onednn, packed


@dataclass(frozen=True)
class Embed:
    """An `EmbedStep`."""

    step: EmbedStep
    """Its parameters."""
    weight: Float[Tensor, "out in k k"]
    """Packed for oneDNN where there is one."""
    packed: bool
    """Whether it is."""
    bias: Float[Tensor, "out"] | None
    """In the weight's dtype, as the next two."""
    prefix: Float[Tensor, "P out"] | None
    """As the step's."""
    position: Float[Tensor, "tokens out"] | None
    """As the step's."""

    @classmethod
    def of(cls, step: EmbedStep, int8: bool) -> "Embed":
        k, weight = step.kernel, unflatten_weight(step.weight, step.kernel, step.size is None).contiguous()
        size = step.size or tuple((side - 1) * step.stride + k - 2 * step.padding for side in step.grid)
        vectors = (t.to(weight.dtype) if t is not None else None for t in (step.bias, step.prefix, step.position))
        if onednn().convolutions:
            return cls(step, packed(weight, (1, weight.shape[1], *size), step.stride, (step.padding,) * 2, 1), True, *vectors)
        return cls(step, weight, False, *vectors)

    @property
    def how(self) -> str:
        return "oneDNN, packed" if self.packed else "conv2d"

    def run(self, x: Tensor) -> Float[Tensor, "B N C"]:
        step = self.step
        if x.dim() == 4:
            size, x = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2).contiguous()
        else:
            size = step.size
        if self.packed:
            y = convolve_tokens(x, size, self.weight, self.bias, step.grid, step.stride, (step.padding,) * 2, 1)
        else:
            pictures = x.transpose(1, 2).unflatten(2, size)
            y = F.conv2d(pictures, self.weight, self.bias, step.stride, step.padding).flatten(2).transpose(1, 2)
        y = normalised(y, step.norm).view(y.shape) if step.norm is not None else y
        if self.prefix is not None:
            y = torch.cat([self.prefix.expand(len(y), -1, -1), y], dim=1)
        return (y if self.position is None else y + self.position).contiguous()
