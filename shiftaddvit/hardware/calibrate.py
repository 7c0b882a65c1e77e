"""What values every tensor takes on images, in memory that does not grow with their number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .layers import Layer, float_run

_PIXELS = 65536
"""Pixels that go through the network together."""
_SAMPLE = 2**14
"""Values of a tensor that are kept of each such part, beside the largest."""


@dataclass(frozen=True)
class Observed:
    """Values of one tensor."""

    shape: tuple[int, ...]
    """For one image."""
    values: Float[Tensor, "n"]
    """A regular sample, and the largest magnitudes."""


def in_parts(image: Float[Tensor, "B N C"], run: Callable[[Tensor], Tensor]) -> Float[Tensor, "B K"]:
    """`run` on a few images at a time, results joined."""
    return torch.cat([run(part) for part in image.split(max(1, _PIXELS // image.shape[1]))])


def observe(layers: list[Layer], image: Float[Tensor, "B N C"]) -> tuple[dict[str, Observed], Float[Tensor, "B K"]]:
    """What every tensor holds on normalised images, and the logits."""
    parts: dict[str, list[Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def run(part: Tensor) -> Tensor:
        tensors = float_run(layers, part)
        for name, tensor in tensors.items():
            flat = tensor.double().flatten()
            # An odd step visits every channel.
            sample = flat[:: flat.numel() // _SAMPLE | 1]
            parts.setdefault(name, []).append(torch.cat([sample, flat.abs().max().reshape(1)]))
            shapes[name] = tuple(tensor.shape[1:])
        return tensors[layers[-1].name][:, 0]

    logits = in_parts(image, run)
    return {name: Observed(shapes[name], torch.cat(found)) for name, found in parts.items()}, logits
