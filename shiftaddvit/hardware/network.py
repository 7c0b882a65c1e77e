"""The integer network: a JSON description and named arrays of integers. NumPy only."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import reference

VERSION = 1
"""Of the description; docs/hardware.md says what it holds."""


@dataclass(frozen=True)
class Network:
    """Everything that an inference needs."""

    description: dict[str, Any]
    """What `network.json` holds."""
    arrays: dict[str, np.ndarray]
    """By the names that descriptors give."""

    @cached_property
    def layers(self) -> dict[str, dict[str, Any]]:
        """Descriptors by name."""
        return {layer["name"]: layer for layer in self.description["layers"]}

    def to_integers(self, image: np.ndarray) -> np.ndarray:
        """Normalised pixels (B, H·W, C) at the fraction of the tensor `image`, halves away from zero, saturated."""
        tensor = self.description["tensors"]["image"]
        scaled = np.asarray(image, np.float64) * 2.0 ** tensor["fraction"]
        return reference.saturate(np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64), tensor["bits"])

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every tensor for an integer image, by the NumPy reference."""
        return reference.run(self.description, self.arrays, image)
