"""The least-energy row-stationary mapping of one operation, over all tile sizes.

Loops are cut as N0·N3, M0·M1·M2·M3, C0·C1·C2, E1·E3: index 0 inside a PE (N0: in the buffer), 1 across the array, 2 in the buffer, 3 off
chip. Tiles need not divide their loops. The schedule of M, C and E is fixed for a layer, so a part-filled tile of them costs a full one
(only what does not exist is not fetched from DRAM); how many images or tokens there are is data, so N ends early. For a fixed tiling every
count is a ceiling that never falls when a loop grows, so the least energy does not either. Where tiles divide their loops the counts are
those of the published model.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .tiles import tight_sizes
from .units import Units

Cells = dict[tuple[str, str], NDArray]


@dataclass(frozen=True)
class Problem:
    """One group of an operation, its operands' widths, and the accelerator."""

    loops: tuple[int, int, int, int, int, int, int, int, int]
    """N, C, M, R, S, H, W, E, F."""
    stride: tuple[int, int]
    """Of the window: rows, columns."""
    primitive: str
    """What a step does."""
    bits: tuple[int, int, int, int]
    """Of input, weight, partial sum and output."""
    units: Units
    """Energies and sizes."""


@dataclass(frozen=True)
class Tilings:
    """Tile sizes of many tilings, one array a loop."""

    m0: NDArray
    m1: NDArray
    m2: NDArray
    c0: NDArray
    c1: NDArray
    e1: NDArray


@lru_cache(maxsize=65536)
def best_mapping(problem: Problem) -> tuple[dict[tuple[str, str], float], dict[str, int]] | None:
    """(pJ by (level, operand), tile sizes) of the least energy; None if the kernel fits no PE, array or buffer."""
    m, c, e = _output_tiles(problem), _channel_tiles(problem), _row_tiles(problem)
    if not len(e) or not c.size:
        return None
    m = m[:, _tokens_beside(problem, m) >= 1]
    if not m.size:
        return None
    extra_m, extra_c, extra_e, least = _bounds(problem, m, c, e)
    few = (_promising(m.prod(axis=0), extra_m), _promising(c[1], extra_c), _promising(e, extra_e))
    found = _least(problem, m, c, e, *(index.ravel() for index in np.meshgrid(*few, indexing="ij")))
    # Against the best one seen, a tiling has no chance whose parts, all else at its least, are dearer already.
    room = (found[0] - least) * (1 + 1e-9) if found else np.inf
    rest = [np.flatnonzero(extra <= room) for extra in (extra_m, extra_c, extra_e)]
    a, b = np.nonzero(np.add.outer(extra_m[rest[0]], extra_c[rest[1]]) <= room)
    for row in rest[2]:
        a_row, b_row = rest[0][a], rest[1][b]
        left = extra_m[a_row] + extra_c[b_row] <= room - extra_e[row] if found else np.ones(len(a), dtype=bool)
        better = _least(problem, m, c, e, a_row[left], b_row[left], np.full(left.sum(), row))
        if better and (found is None or better[0] < found[0]):
            found = better
    return None if found is None else (found[1], found[2])


def _least(problem: Problem, m: NDArray, c: NDArray, e: NDArray, a: NDArray, b: NDArray, d: NDArray
           ) -> tuple[float, dict[tuple[str, str], float], dict[str, int]] | None:  # fmt: skip
    """The best that fits of the combinations of column a of `m`, b of `c` and d of `e`: total, pJ by (level, operand), tile sizes."""
    _, _, _, r, s, _, _, _, _ = problem.loops
    units = problem.units
    fits = m[1, a] * c[1, b] * e[d] * r <= units.size("pes")
    fits &= m[0, a] * c[0, b] * s * problem.bits[1] <= units.size("rf_weight_words") * 16
    tilings = Tilings(*m[:, a[fits]], *c[:, b[fits]], e[d[fits]])
    n0 = _tokens_in_buffer(problem, tilings)
    if not (n0 >= 1).any():
        return None
    cells = energies(problem, tilings, np.maximum(n0, 1))
    total = np.where(n0 >= 1, sum(cells.values()), np.inf)
    best = int(total.argmin())
    chosen = {name.upper(): int(values[best]) for name, values in vars(tilings).items()} | {"N0": int(n0[best])}
    return float(total[best]), {key: float(values[best]) for key, values in cells.items()}, chosen


def _tokens_in_buffer(problem: Problem, t: Tilings) -> NDArray:
    """N0, the more the better: each needs a window of input rows and the partial sums of a block of outputs."""
    n, _, _, r, s, _, _, _, f = problem.loops
    window = ((t.e1 - 1) * problem.stride[0] + r) * ((f - 1) * problem.stride[1] + s)
    need = t.c0 * t.c1 * window * problem.bits[0] + t.m0 * t.m1 * t.m2 * t.e1 * f * problem.bits[2]
    return np.minimum(problem.units.size("buffer_words") * 16 // need, n)


def _tokens_beside(problem: Problem, m: NDArray) -> NDArray:
    """The most tokens that the buffer can hold beside the partial sums of a block of outputs, however C and E are cut."""
    return _tokens_in_buffer(problem, Tilings(*m, *np.ones((3, m.shape[1]), dtype=np.int64)))


def energies(problem: Problem, t: Tilings, n0: NDArray) -> Cells:
    """pJ by (level, operand) of each tiling."""
    n, c, m, r, s, h, w, e, f = problem.loops
    units = problem.units
    per_input, per_weight, per_sum, per_output = (bits / 16 for bits in problem.bits)
    inputs, weights, outputs = n * h * w * c * per_input, r * s * c * m * per_weight, n * e * f * m
    n3, e3 = -(-n // n0), -(-e // t.e1)
    block = t.m0 * t.m1 * t.m2
    blocks, passes = -(-m // block), -(-c // (t.c0 * t.c1))
    rounds = blocks * t.m2  # of fetching the inputs from the buffer
    fill_m, fill_c, fill_e = blocks * block / m, passes * t.c0 * t.c1 / c, e3 * t.e1 / e
    steps = n * m * c * r * s * e * f * (fill_m * fill_c * fill_e)
    strips = passes * t.c1 * r  # PEs that hold a share of one output, over all passes
    sums = outputs * per_sum * fill_m * fill_e
    return {
        ("dram", "input"): units.access("dram") * inputs * blocks,
        ("dram", "weight"): units.access("dram") * weights * n3 * e3,
        ("dram", "output"): np.full(len(n0), units.access("dram") * outputs * per_output),
        ("buffer", "input"): units.access("buffer") * inputs * rounds,
        ("buffer", "output"): units.access("buffer") * outputs * per_sum * np.maximum(2 * (passes - 1), 1),
        ("noc", "input"): units.access("noc") * inputs * (r * e / h) * (rounds * t.m1) * fill_c * fill_e,
        ("noc", "weight"): units.access("noc") * weights * e * n3 * (fill_m * fill_c * fill_e),
        ("noc", "output"): units.access("noc_partial_sum") * sums * np.maximum(strips - passes, 1),
        ("rf", "input"): units.access("rf") * per_input * steps,
        ("rf", "weight"): units.access("rf_weight") * per_weight * steps,
        ("rf", "output"): units.access("rf") * sums * np.maximum(2 * (passes * t.c0 * t.c1 * r * s - strips), 1),
        ("compute", "arithmetic"): units.mac(problem.primitive, *problem.bits[:3]) * steps,
    }


def _output_tiles(problem: Problem) -> NDArray:
    """(M0, M1, M2) in columns."""
    _, _, m, r, _, _, _, _, _ = problem.loops
    limit = max(problem.units.size("rf_partial_sums") * 16 // problem.bits[2], 1)
    return _triples(m, limit, problem.units.size("pes") // r)


@lru_cache(maxsize=1024)
def _triples(m: int, limit: int, pes: int) -> NDArray:
    parts = []
    for m0 in tight_sizes(m, limit):
        for m1 in tight_sizes(-(-m // m0), pes):
            m2 = tight_sizes(-(-m // (m0 * m1)), m)
            parts.append(np.stack([np.full_like(m2, m0), np.full_like(m2, m1), m2]))
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)


def _channel_tiles(problem: Problem) -> NDArray:
    """(C0, C1) in columns."""
    _, c, _, r, s, _, _, _, _ = problem.loops
    limit = problem.units.size("rf_input_words") * 16 // (s * problem.bits[0])
    return _pairs(c, limit, problem.units.size("pes") // r)


@lru_cache(maxsize=1024)
def _pairs(c: int, limit: int, pes: int) -> NDArray:
    parts = [np.zeros((2, 0), dtype=np.int64)]
    for c0 in tight_sizes(c, limit):
        c1 = tight_sizes(-(-c // c0), pes)
        parts.append(np.stack([np.full_like(c1, c0), c1]))
    return np.concatenate(parts, axis=1)


def _row_tiles(problem: Problem) -> NDArray:
    """E1."""
    _, _, _, r, _, _, _, e, _ = problem.loops
    return tight_sizes(e, problem.units.size("pes") // r)


def _bounds(problem: Problem, m: NDArray, c: NDArray, e: NDArray) -> tuple[NDArray, NDArray, NDArray, float]:
    """By how much each tiling of M, of C and of E exceeds the least when all else is at its least; and that
    least. Every cell is a product of what M, C and E each decide, and (1 + x)(1 + y) ≥ 1 + x + y for x, y ≥ 0, so no combination costs less
    than the least plus the excesses of its parts."""
    n, loop_c, loop_m, _, _, _, _, loop_e, _ = problem.loops
    one = np.ones(1, dtype=np.int64)

    def cells(m: NDArray, c: NDArray, e: NDArray, n0: NDArray) -> NDArray:
        return np.stack([np.broadcast_to(v, n0.shape) for v in energies(problem, Tilings(*m, *c, e), n0).values()])

    whole_m, whole_c, whole_e = np.array([[loop_m], [1], [1]]), np.array([[loop_c], [1]]), loop_e * one
    whole = cells(whole_m, whole_c, whole_e, n * one)
    parts = [
        cells(m, whole_c, whole_e, _tokens_beside(problem, m)),
        cells(whole_m, c, whole_e, np.full(c.shape[1], n)),
        cells(whole_m, whole_c, e, np.full(len(e), n)),
    ]
    whole = np.where(whole > 0, whole, 1.0)  # a free level stays free, whatever it is divided by
    parts = [part / whole for part in parts]
    lowest = [part.min(axis=1, keepdims=True) for part in parts]
    least = whole * np.prod(lowest, axis=0)
    excess = [(least * (part / np.where(low > 0, low, 1.0) - 1)).sum(axis=0) for part, low in zip(parts, lowest, strict=True)]
    return *excess, float(least.sum())


def _promising(size: NDArray, excess: NDArray) -> NDArray:
    """A few indices: of each magnitude of `size`, those of the least excess."""
    magnitude = np.log2(size).astype(int)
    order = np.lexsort((excess, magnitude))
    rank = np.arange(len(order)) - np.searchsorted(magnitude[order], magnitude[order])
    return order[rank < 3]
