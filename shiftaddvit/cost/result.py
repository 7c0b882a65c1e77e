"""What the energy model answers, as data."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .operations import Uncosted

LEVELS = ("dram", "buffer", "noc", "rf", "compute")
"""Off-chip memory, global buffer, network between the processing elements, register files, arithmetic."""
OPERANDS = ("input", "weight", "output", "arithmetic")

Cells = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one operation, in pJ."""

    name: str
    """Module that executes it."""
    kind: str
    """`linear`, `conv`, `product`, or the kind of a stream of elements."""
    primitive: str
    """`mult`, `shift`, `add`, `adder`, or `stream`."""
    shape: str
    """Its sizes, for people."""
    macs: float
    """Steps, or elements of a stream."""
    cells: Cells
    """pJ by (level, operand)."""
    tiling: Mapping[str, int]
    """The tile sizes or counts that were chosen; empty for a stream."""
    share: float = 1.0
    """Share of the tokens that it gets, for an operation of an expert."""
    latency_ms: float | None = None
    """Time in the published latency model (mode `paper`)."""
    role: str = ""
    """`router` for a router's own operations."""

    @property
    def pj(self) -> float:
        """The total."""
        return sum(self.cells.values())

    def by_level(self) -> dict[str, float]:
        """pJ at each level."""
        return {level: sum(e for (where, _), e in self.cells.items() if where == level) for level in LEVELS}

    def by_operand(self) -> dict[str, float]:
        """pJ of each operand."""
        return {operand: sum(e for (_, what), e in self.cells.items() if what == operand) for operand in OPERANDS}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        matrix: dict[str, dict[str, float]] = {}
        for (level, operand), energy in self.cells.items():
            matrix.setdefault(level, {})[operand] = energy
        return {
            "name": self.name, "kind": self.kind, "primitive": self.primitive, "shape": self.shape, "macs": self.macs,
            "share": self.share, "total_pj": self.pj, "levels": self.by_level(), "operands": self.by_operand(),
            "levels_operands": matrix, "tiling": dict(self.tiling), "latency_ms": self.latency_ms,
        }  # fmt: skip


@dataclass(frozen=True)
class ExpertTokens:
    """How a mixture's tokens were divided."""

    mixture: str
    """Module name."""
    primitives: tuple[str, ...]
    """What each expert computes with."""
    shares: tuple[float, ...]
    """Share of the tokens of each expert."""
    mean: tuple[float, ...]
    """Tokens of an image for each expert: the mean over the images, or what the forced share gives."""
    sd: tuple[float, ...] | None = None
    """Standard deviation over the images; None when the shares were not measured."""


@dataclass(frozen=True)
class Energy:
    """The energy of one forward."""

    model: str
    """What was costed."""
    per_layer: tuple[LayerEnergy, ...]
    """Every costed operation, in the order of execution."""
    uncosted: tuple[Uncosted, ...]
    """What was executed and is not in the total."""
    settings: Mapping[str, Any]
    """Mode, shift share, bits, units, flags: everything the numbers depend on."""
    tokens: tuple[ExpertTokens, ...] = ()
    """How each mixture's tokens were divided."""
    scale: float = 1.0
    """Times that the layers are executed: chunks of rays in an image."""
    sd_mj: float | None = None
    """Standard deviation of the total over the images whose routing was measured."""
    second_fetch_mj: float = field(default=0.0)
    """What more it would be if every expert of a mixture fetched all its weights for this forward alone."""

    @property
    def total_mj(self) -> float:
        """Millijoules."""
        return sum(layer.pj for layer in self.per_layer) * self.scale * 1e-9

    @property
    def latency_ms(self) -> float | None:
        """The published latency model's time, one operation after the other (mode `paper`)."""
        times = [layer.latency_ms for layer in self.per_layer]
        return None if not times or None in times else sum(times) * self.scale

    def by_level(self) -> dict[str, float]:
        """mJ at each level."""
        return self._sum(layer.by_level() for layer in self.per_layer)

    def by_operand(self) -> dict[str, float]:
        """mJ of each operand."""
        return self._sum(layer.by_operand() for layer in self.per_layer)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """mJ at each level, by kind of layer (`linear (shift)`, `softmax`, …)."""
        groups = defaultdict(list)
        for layer in self.per_layer:
            groups[kind_name(layer)].append(layer.by_level())
        return {kind: self._sum(rows) for kind, rows in groups.items()}

    def _sum(self, rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
        total: dict[str, float] = {}
        for row in rows:
            for key, value in row.items():
                total[key] = total.get(key, 0.0) + value * self.scale * 1e-9
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `shiftaddvit energy --json` prints them."""
        return {
            "model": self.model, "total_mj": self.total_mj, "sd_mj": self.sd_mj, "second_fetch_mj": self.second_fetch_mj,
            "latency_ms": self.latency_ms, "scale": self.scale, "by_level_mj": self.by_level(),
            "by_operand_mj": self.by_operand(), "by_kind_mj": {k: sum(v.values()) for k, v in self.by_kind().items()},
            "per_layer": [layer.to_dict() for layer in self.per_layer],
            "tokens": [asdict(entry) for entry in self.tokens],
            "uncosted": [asdict(entry) for entry in self.uncosted],
            "settings": dict(self.settings),
        }  # fmt: skip


def kind_name(layer: LayerEnergy) -> str:
    """The row of a table that a layer belongs to."""
    if layer.role:
        return layer.role
    return layer.kind if layer.primitive == "stream" else f"{layer.kind} ({layer.primitive})"
