"""Counting what a network computes, and proving that its converted layers do not multiply. NumPy only.

Two proofs that do not know of one another. The reference is run once on arrays that tell every operation done to them: a layer whose
primitive is `shift` or `add` may add, negate, compare, select and shift; anything else in it, an operation that is not known, or a result
that nobody watched is a failure. And the source of those kinds, with the functions it calls, is read: it holds no product, quotient,
power or matrix product, and calls nothing of NumPy that could.
"""

import ast
import inspect
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import reference
from .network import Network

FREE_OF_MULTIPLICATION = {
    "add": "add", "subtract": "add", "negative": "negate", "left_shift": "shift", "right_shift": "shift", "minimum": "compare", "maximum": "compare",
    "greater": "compare", "greater_equal": "compare", "less": "compare", "less_equal": "compare", "equal": "compare",
}  # fmt: skip
"""Operations that a converted layer may do, and what they count as."""

MULTIPLYING = {"multiply": "multiply", "matmul": "multiply", "floor_divide": "divide"}
"""Operations of the other layers."""

_MOVING = {"where", "concatenate", "broadcast_to", "pad", "zeros_like", "empty_like", "copyto", "argmax", "max", "sum"}
"""Functions that move data, or whose operations are counted by themselves."""

_CALLS_IN_CONVERTED = {"where", "minimum", "maximum", "asarray", "zeros", "int64"}
"""What the source of a converted kind may call of NumPy."""


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
        if self.tally is not None and function.__name__ not in _MOVING:
            self.tally[function.__name__] += 1
        result = super().__array_function__(function, types, args, kwargs)
        return watched(result, self.tally) if isinstance(result, np.ndarray) else result

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
    source: tuple[str, ...]
    """Products in the source of the converted kinds."""

    @property
    def failures(self) -> list[str]:
        """One line for every layer that did what it must not, and for every product in the source; empty is a pass."""
        did = [f"{one.name} ({one.kind}, primitive {one.primitive}) did {', '.join(one.forbidden)}" for one in self.layers if one.forbidden]
        return did + list(self.source)

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
        # An operation between two constants is done in advance and does not count; one with a tensor does.
        output = reference.run_layer(layer, network.arrays, inputs)
        # What is read from a table is the table's own array.
        if not isinstance(output, Watched) and layer["kind"] != "table":
            tally["something that was not watched"] += 1
        tensors[layer["name"]] = np.asarray(output)
        names = FREE_OF_MULTIPLICATION | MULTIPLYING
        counts: Counter = Counter()
        for operation, count in tally.items():
            counts[names.get(operation, operation)] += count
        found.append(LayerCount(layer["name"], layer["kind"], layer["primitive"], dict(sorted(counts.items()))))
    return Audit(tuple(found), tuple(products_in_source(sorted({one.kind for one in found if one.converted}))))


def products_in_source(kinds: list[str]) -> list[str]:
    """Products in the source of kinds of the reference and of what they call there, one line each; empty is a pass."""
    tree = {node.name: node for node in ast.parse(inspect.getsource(reference)).body if isinstance(node, ast.FunctionDef)}
    seen, waiting, found = set(), [reference.KINDS[kind].__name__ for kind in kinds], []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(tree[name]):
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, (ast.Mult, ast.MatMult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)):
                found.append(f"{name}, line {node.lineno} of reference.py: {type(node.op).__name__}")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "np"
                and node.attr not in _CALLS_IN_CONVERTED
            ):
                found.append(f"{name}, line {node.lineno} of reference.py: np.{node.attr}")
            if isinstance(node, ast.Name) and node.id in tree:
                waiting.append(node.id)
    return found
