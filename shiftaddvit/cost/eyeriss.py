"""Mode `eyeriss`: least-energy row-stationary mapping, on an accelerator of one's own unit energies.

Groups and heads have weights of their own, kernels need not be square, operands have their own widths, accumulation is charged, and a
kernel that does not fit is unfolded. Element-wise work is charged too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from shiftaddvit.errors import UserError

from .mapper import Problem, best_mapping
from .operations import Nest, Stream
from .streams import FUNCTIONS
from .units import Units


@dataclass(frozen=True)
class BitWidths:
    """Widths of the operands, in bits."""

    activation: int = 16
    """Inputs and outputs of every layer, and both operands of a product of activations."""
    weight: int = 16
    """Weights of multiplication and adder layers."""
    shift_weight: int | None = None
    """Codes of shift layers; None takes what each layer says (5 where none does)."""
    code: int = 1
    """The binary operand of a MatAdd."""
    partial_sum: int = 32
    """Sums under way, and their accumulation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "shift_weight":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
                raise UserError(f"{field.name} bits must be a whole number from 1 to 64, got {value!r}")


@dataclass(frozen=True)
class Mapped:
    """An operation on the accelerator."""

    cells: Mapping[tuple[str, str], float]
    """pJ by (level, operand), over all groups."""
    tiling: Mapping[str, int]
    """Tile sizes, and `unfolded` = 1 where the kernel was written out as a matrix product."""
    weight_fetch: float
    """pJ of reading every weight from DRAM once."""


def operand_bits(nest: Nest, bits: BitWidths) -> tuple[int, int, int, int]:
    """Bits of input, weight, partial sum and output."""
    if nest.primitive == "add":
        return bits.code, bits.activation, bits.partial_sum, bits.activation
    if nest.kind == "product":
        return bits.activation, bits.activation, bits.partial_sum, bits.activation
    weight = bits.weight if nest.primitive != "shift" else bits.shift_weight or nest.weight_bits or 5
    return bits.activation, weight, bits.partial_sum, bits.activation


def map_nest(nest: Nest, units: Units, bits: BitWidths) -> Mapped:
    """Least energy and its tiling. UserError if not even the unfolded matrix product fits the accelerator."""
    found, unfolded = best_mapping(_problem(nest, units, bits)), {}
    if found is None:
        found, unfolded = best_mapping(_problem(nest.unfolded(), units, bits)), {"unfolded": 1}
    if found is None:
        raise UserError(
            f"{nest.name} does not fit the accelerator of unit table {units.name!r}: a PE must hold at least one input and one weight of "
            f"{operand_bits(nest, bits)[:2]} bits, and the buffer one input and one partial sum"
        )
    cells, tiling = found
    weights = nest.groups * nest.R * nest.S * nest.C * nest.M * operand_bits(nest, bits)[1] / 16
    return Mapped({key: nest.groups * pj for key, pj in cells.items()}, tiling | unfolded, weights * units.access("dram"))


def _problem(nest: Nest, units: Units, bits: BitWidths) -> Problem:
    loops = (nest.N, nest.C, nest.M, int(nest.R), int(nest.S), nest.H, nest.W, nest.E, nest.F)
    return Problem(loops, nest.stride, nest.primitive, operand_bits(nest, bits), units)


def stream_cells(stream: Stream, units: Units, bits: BitWidths, fused: bool = True) -> dict[tuple[str, str], float]:
    """pJ by (level, operand) of elements that pass by once; see `Stream.kind` for what is read and written. `fused`: what takes one row
    at a time happens as the row passes through the buffer, and tokens are dispatched by their index."""
    width, counts = bits.activation, (stream.reads, stream.writes, stream.elements)
    if fused and stream.kind == "dispatch":
        width, counts = 16, (stream.rows,) * 3
    words_in, words_out, words = (count * width / 16 for count in counts)
    cells = {("rf", "input"): units.access("rf") * words, ("rf", "output"): units.access("rf") * words}
    if stream.kind != "pointwise":
        # Dispatched tokens stay on the chip: an expert reads its tokens by index.
        for level in ("buffer", "noc") if stream.kind == "dispatch" or (fused and stream.rows) else ("dram", "buffer", "noc"):
            cells[level, "input"] = units.access(level) * words_in
            cells[level, "output"] = units.access(level) * words_out
    if stream.kind in ("norm", "softmax"):
        cells["buffer", "input"] += units.access("buffer") * words_in  # statistics first, then the values again
    mults, adds = FUNCTIONS[stream.function]
    step = mults * units.step("mult", width) + adds * units.step("add", width)
    cells["compute", "arithmetic"] = stream.elements * step
    return cells
