"""Counting what a network computes, and proving that its converted layers do not multiply. NumPy only.

The reference is run once on arrays that tell every operation done to them. A layer whose primitive is `shift` or `add` may add, subtract,
compare, select and shift; anything else in it, or an operation that is not known, is a failure.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import reference
from .network import Network

FREE_OF_MULTIPLICATION = {
    "add": "add", "subtract": "add", "negative": "add", "left_shift": "shift", "right_shift": "shift", "minimum": "compare", "maximum": "compare",
    "greater": "compare", "greater_equal": "compare", "less": "compare", "less_equal": "compare", "equal": "compare",
}  # fmt: skip
"""Operations that a converted layer may do, and what they count as."""

MULTIPLYING = {"multiply": "multiply", "matmul": "multiply", "floor_divide": "divide"}
"""Operations of the other layers."""

_MOVING = {"where", "concatenate", "broadcast_to", "pad", "expand_dims", "argmax", "zeros_like", "amax", "max", "sum"}
"""Functions that move data, or do what the operations inside them are counted for."""


class Watched(np.ndarray):
    """An array that tells `tally` every operation it takes part in: {operation: elements}."""

    tally: Counter | None = None

    def __array_finalize__(self, source: np.ndarray | None) -> None:
        self.tally = getattr(source, "tally", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: np.ndarray, **kwargs: object) -> np.ndarray:
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        operation = ufunc.__name__ if ufunc.__name__ != "matvec" else "matmul"
        count = result.size if method == "__call__" else np.size(plain[0])
        if operation == "matmul":
            count = result.size * plain[0].shape[-1]
        if self._tally_of(inputs) is not None:
            self._tally_of(inputs)[operation] += int(count)
        return watched(result, self._tally_of(inputs))

    def __array_function__(self, function, types, args, kwargs):
        tally = self.tally
        if tally is not None and function.__name__ not in _MOVING:
            tally[function.__name__] += 1
        return super().__array_function__(function, types, args, kwargs)

    @staticmethod
    def _tally_of(inputs: tuple) -> Counter | None:
        return next((x.tally for x in inputs if isinstance(x, Watched) and x.tally is not None), None)


def watched(array: np.ndarray, tally: Counter | None) -> Watched:
    """A view of `array` that counts into `tally`."""
    view = np.asarray(array).view(Watched)
    view.tally = tally
    return view


@dataclass(frozen=True)
class LayerCount:
    """What one layer did for one image."""

    name: str
    """The layer."""
    kind: str
    """A function of the reference."""
    primitive: str
    """mult, shift, add or none."""
    counts: dict[str, int]
    """{add, shift, compare, multiply, divide or an operation's name: how many}."""

    @property
    def converted(self) -> bool:
        """Whether it must not multiply."""
        return self.primitive in ("shift", "add")

    @property
    def forbidden(self) -> list[str]:
        """What it did that its primitive does not allow."""
        allowed = set(FREE_OF_MULTIPLICATION.values()) if self.converted else {*FREE_OF_MULTIPLICATION.values(), *MULTIPLYING.values()}
        if self.primitive == "none":
            allowed = set(FREE_OF_MULTIPLICATION.values())
        return sorted(set(self.counts) - allowed)


@dataclass(frozen=True)
class Audit:
    """What a network did for one image."""

    layers: tuple[LayerCount, ...]
    """In order."""

    @property
    def failures(self) -> list[str]:
        """One line for every layer that did what it must not; empty is a pass."""
        return [f"{one.name} ({one.kind}, primitive {one.primitive}) did {', '.join(one.forbidden)}" for one in self.layers if one.forbidden]

    def total(self, *, converted: bool) -> dict[str, int]:
        """Operations of all converted layers, or of all others."""
        total: Counter = Counter()
        for one in self.layers:
            if one.converted == converted:
                total.update(one.counts)
        return dict(sorted(total.items()))

    def remaining(self) -> dict[str, int]:
        """{kind: multiplications and divisions} of what still multiplies."""
        total: Counter = Counter()
        for one in self.layers:
            total[one.kind] += one.counts.get("multiply", 0) + one.counts.get("divide", 0)
        return {kind: count for kind, count in sorted(total.items(), key=lambda pair: -pair[1]) if count}

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "per_image": True,
            "converted": self.total(converted=True),
            "others": self.total(converted=False),
            "multiplications_and_divisions_by_kind": self.remaining(),
            "layers": [{"name": one.name, "kind": one.kind, "primitive": one.primitive, "counts": one.counts} for one in self.layers],
            "failures": self.failures,
        }


def audit(network: Network, image: np.ndarray) -> Audit:
    """Run the reference on one integer image (1, H·W, C), counting. Mixtures run all their experts, as the reference does."""
    tensors = {"image": np.asarray(image, np.int64)[:1]}
    found = []
    for layer in network.description["layers"]:
        tally: Counter = Counter()
        inputs = [watched(tensors[name], tally) for name in layer["inputs"]]
        # Constants count too: an operation between two of them is done in advance, one with a tensor is not.
        tensors[layer["name"]] = np.asarray(reference.run_layer(layer, network.arrays, inputs))
        names = FREE_OF_MULTIPLICATION | MULTIPLYING
        counts: Counter = Counter()
        for operation, count in tally.items():
            counts[names.get(operation, operation)] += count
        found.append(LayerCount(layer["name"], layer["kind"], layer["primitive"], dict(sorted(counts.items()))))
    return Audit(tuple(found))
