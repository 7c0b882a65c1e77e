"""Mode `paper`: the published analytical Eyeriss model, bit for bit, its quirks included.

Its loops are cut by exact divisors. Of the published tilings the first is taken that minimises
(E − E_min)/E_max + (L − L_min)/L_max over all that fit.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shiftaddvit.errors import UserError

from .operations import Nest
from .tiles import divisors, exact_splits

_RF = 3.7
INPUT = {"dram": 200.0, "buffer": 6 * _RF, "noc": 2 * _RF, "rf": _RF}
WEIGHT = {"dram": 200.0, "noc": 2 * _RF, "rf": 2 * _RF}
OUTPUT = {"dram": 200.0, "buffer": 6 * _RF, "noc": _RF, "rf": _RF}
"""pJ for 16 bits."""
COMPUTE = {32: {"mult": 3.7, "add": 0.9, "shift": 0.13, "adder": 0.9}, 8: {"mult": 0.2, "add": 0.03, "shift": 0.024, "adder": 0.03}}
"""pJ a step; no accumulation is charged. The published model has no adder layers: ours, in its terms, is the one subtraction."""
SHIFT_WORD_BITS = (16 + 5) // 2
"""Width of every operand of a shift layer: the mean of activation and code, for input, weight and output alike."""
STEP_NS = 4.0
SHIFT_SPEEDUP = 3.2


class NoMapping(UserError):
    """An operation that no tiling of the accelerator can hold."""


@dataclass(frozen=True)
class Mapped:
    """An operation on the accelerator."""

    cells: tuple[tuple[tuple[str, str], float], ...]
    """pJ by (level, operand)."""
    tiling: tuple[tuple[str, int], ...]
    """Tile counts by loop."""
    latency_ms: float
    """N3·N0·M3·M2·M0·C3·C2·C0·E3·F·S steps of 4 ns, a shift 3.2 times faster."""


def published_nest(nest: Nest) -> Nest:
    """The nest as the published op lists write it: groups and heads become rows that share one weight; kernels are squares."""
    side = (nest.R * nest.S) ** 0.5
    return replace(nest, groups=1, N=nest.groups * nest.N, R=side, S=side)


def map_nest(nest: Nest, bits: int = 32) -> Mapped:
    """Energy and tiling of one operation. NoMapping, naming it, if no tiling fits."""
    nest = published_nest(nest)
    _, n, c, m, r, s, h, w, e, f, stride = nest.shape()
    found = _search(n, c, m, r, s, h, w, e, f, max(stride), nest.kind != "conv", nest.primitive, bits)
    if found is None:
        raise NoMapping(
            f"{nest.name} ({nest.kind} {describe(nest)}) has no valid mapping in the published model; leave it out with "
            f"--exclude {nest.name!r}, or use mode 'eyeriss'"
        )
    return found


def describe(nest: Nest) -> str:
    """Sizes of an operation for people."""
    if nest.kind != "conv":
        groups = f"{nest.groups} × " if nest.groups > 1 else ""
        return f"{groups}{nest.N}×{nest.C}→{nest.M}"
    groups = f", {nest.groups} groups" if nest.groups > 1 else ""
    return f"{nest.C}→{nest.M}, kernel {nest.R:g}×{nest.S:g}, stride {max(nest.stride)}, {nest.H}×{nest.W}→{nest.E}×{nest.F}{groups}"


@lru_cache(maxsize=65536)
def _search(n: int, c: int, m: int, r: float, s: float, h: int, w: int, e: int, f: int, st: int,
            linear: bool, primitive: str, bits: int) -> Mapped | None:  # fmt: skip
    storage, elements = (2, 4) if bits == 8 else (1, 1)
    ms = exact_splits(m, 4)
    ms = ms[ms[:, 0] <= 16]
    cs = exact_splits(c, 3)
    es = exact_splits(e, 2)
    if not linear:
        es = es[es[:, 0] != 1]
    # Rows in the order of nested loops over M, C and E, so that `argmin` finds the first.
    a, b, d = (index.ravel() for index in np.meshgrid(*map(np.arange, (len(ms), len(cs), len(es))), indexing="ij"))
    pes = ms[a, 1] * cs[b, 1] * es[d, 0] * r
    fits = (pes < 192 * elements) & (cs[b, 0] * s < 12 * storage) & (ms[a, 0] * cs[b, 0] * s < 960 * storage)
    m0, m1, m2, m3 = ms[a[fits]].T.astype(float)
    c0, c1, c2 = cs[b[fits]].T.astype(float)
    e1, e3 = es[d[fits]].T.astype(float)
    # Buffer words of one image or token.
    words = c1 * c0 * ((e1 - 1) * st + r) * ((f - 1) * st + s) + m2 * m1 * m0 * e1 * f
    capacity = 65536 * storage
    fits = words < capacity
    if not fits.any():
        return None
    m0, m1, m2, m3, c0, c1, c2, e1, e3, words = (v[fits] for v in (m0, m1, m2, m3, c0, c1, c2, e1, e3, words))
    # N0 enters the energy through weight refetches alone, so the largest wins; the smallest, 1, makes the maximum E_max.
    sizes = np.array(divisors(n))
    largest = np.ceil(capacity / words) - 1  # N0 · words < capacity
    n0 = sizes[np.searchsorted(sizes, largest, side="right") - 1].astype(float)
    tiles = (m0, m1, m2, m3, c0, c1, c2, e1, e3)
    dims = (n, c, m, r, s, h, w, e, f)
    accesses = _accesses(dims, tiles, n0)
    energy = sum(_unit(level, operand, primitive, bits) * count for (level, operand), count in accesses.items())
    energy = energy + _compute(dims, primitive, bits)
    worst = energy + (_weight_energy(dims, tiles, np.ones_like(n0), primitive, bits) - _weight_energy(dims, tiles, n0, primitive, bits))
    latency = n * m3 * m2 * m0 * c2 * c0 * e3 * f * s * STEP_NS / (SHIFT_SPEEDUP if primitive == "shift" else 1.0)
    merit = (energy - energy.min()) / worst.max() + (latency - latency.min()) / latency.max()
    best = int(merit.argmin())
    cells = [(key, float(_unit(*key, primitive, bits) * count[best])) for key, count in accesses.items()]
    cells.append((("compute", "arithmetic"), _compute(dims, primitive, bits)))
    names = ("M0", "M1", "M2", "M3", "C0", "C1", "C2", "E1", "E3", "N0")
    chosen = tuple((name, int(v[best])) for name, v in zip(names, (*tiles, n0), strict=True))
    return Mapped(tuple(cells), (*chosen, ("N3", n // int(n0[best]))), float(latency[best]) * 1e-6)


def _accesses(dims: tuple, tiles: tuple[NDArray, ...], n0: NDArray) -> dict[tuple[str, str], NDArray]:
    """Words moved, by (level, operand); C3 is 1."""
    n, c, m, r, s, h, w, e, f = dims
    m0, m1, m2, m3, c0, c1, c2, e1, e3 = tiles
    inputs, weights, outputs = n * h * w * c, r * s * c * m, n * e * f * m
    n3 = n / n0
    spread = m3 * m2 * m1 * r * e / h * inputs
    return {
        ("dram", "input"): m3 * inputs,
        ("dram", "weight"): n3 * e3 * weights,
        ("dram", "output"): outputs * np.ones_like(n0),
        ("buffer", "input"): m3 * m2 * inputs,
        ("buffer", "output"): np.maximum(2 * (c2 - 1), 1) * outputs,
        ("noc", "input"): spread,
        ("noc", "weight"): n3 * e3 * e1 * weights,
        ("noc", "output"): np.maximum(c2 * (c1 * r - 1), 1) * outputs,
        ("rf", "input"): spread * m0 * s * f / w,
        ("rf", "weight"): n3 * e3 * e1 * f * n0 * weights,
        ("rf", "output"): np.maximum(2 * c2 * c1 * r * (c0 * s - 1), 1) * outputs,
    }


def _weight_energy(dims: tuple, tiles: tuple[NDArray, ...], n0: NDArray, primitive: str, bits: int) -> NDArray:
    accesses = _accesses(dims, tiles, n0)
    return sum(_unit(level, "weight", primitive, bits) * accesses[level, "weight"] for level in ("dram", "noc", "rf"))


def _unit(level: str, operand: str, primitive: str, bits: int) -> float:
    """pJ a word."""
    free_for_add = level in ("dram", "buffer") or (level == "noc" and operand != "output")
    if primitive == "add" and free_for_add:
        return 0.0
    width = SHIFT_WORD_BITS if primitive == "shift" else bits
    return {"input": INPUT, "weight": WEIGHT, "output": OUTPUT}[operand][level] * width / 16


def _compute(dims: tuple, primitive: str, bits: int) -> float:
    n, c, m, r, s, _, _, e, f = dims
    return COMPUTE[bits][primitive] * (n * m * c * r * s * e * f)
