"""Encoded positions in registers, both linears, a tile of points at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..tiles import load_columns


@triton.jit
def _sine(turns, FAST: tl.constexpr):
    """sin(2π turns) for |turns| ≤ 1."""
    angle = turns * 6.283185307179586
    if FAST:
        return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
    return tl.sin(angle)


@triton.jit
def _encoded(px, py, pz, FAST: tl.constexpr):
    """x, y, z, then for each octave three sines and three cosines, then a zero: (rows, 64).

    Angles are counted in turns, split into a part whose multiples by powers of two are exact and the rest, so that the highest octave
    keeps the digits that the coordinate has.
    """
    j = tl.arange(0, 64)
    axis = j % 3
    octave = (j - 3) // 6
    factor = tl.exp2(tl.maximum(octave, 0).to(tl.float32))[None, :]
    quarter = tl.where((j - 3) % 6 >= 3, 0.25, 0.0)[None, :]
    p = tl.where((axis == 0)[None, :], px[:, None], tl.where((axis == 1)[None, :], py[:, None], pz[:, None]))
    high = p * 0.15915494309189535
    low = tl.fma(p, 0.15915494309189535, -high) + p * 6.420638e-9
    turns = high * factor
    turns = turns - tl.floor(turns + 0.5) + low * factor + quarter
    waves = _sine(turns, FAST)
    return tl.where((j < 3)[None, :], p, tl.where((j < 63)[None, :], waves, 0.0))


@triton.jit
def ray_query_kernel(
    q, origin, direction, depths, query_weight, place_weight, heading, out_weight, out_bias, out, N, S,
    C: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = q.dtype.element_ty
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    live = n < N
    cs = tl.arange(0, C)
    ray = n // S
    t = tl.load(depths + n % S, mask=live, other=0.0)
    px = tl.load(origin + ray * 3, mask=live, other=0.0) + t * tl.load(direction + ray * 3, mask=live, other=0.0)
    py = tl.load(origin + ray * 3 + 1, mask=live, other=0.0) + t * tl.load(direction + ray * 3 + 1, mask=live, other=0.0)
    pz = tl.load(origin + ray * 3 + 2, mask=live, other=0.0) + t * tl.load(direction + ray * 3 + 2, mask=live, other=0.0)
    place = _encoded(px, py, pz, FAST).to(T)
    rows = n[:, None].to(tl.int64) * C + cs[None, :]
    hidden = tl.dot(place, load_columns(place_weight, cs, 0, C, 64, 64, T), input_precision=PRECISION)
    a = tl.load(q + rows, mask=live[:, None], other=0.0)
    hidden = tl.dot(a, load_columns(query_weight, cs, 0, C, C, C, T), hidden, input_precision=PRECISION)
    hidden = hidden + tl.load(heading + ray[:, None] * C + cs[None, :], mask=live[:, None], other=0.0)
    hidden = tl.maximum(hidden, 0.0).to(T)
    y = tl.dot(hidden, load_columns(out_weight, cs, 0, C, C, C, T), input_precision=PRECISION)
    tl.store(out + rows, (y + tl.load(out_bias + cs).to(tl.float32)[None, :]).to(T), mask=live[:, None])


def ray_query(
    q: Tensor, origin: Tensor, direction: Tensor, depths: Tensor, query_weight: Tensor, place_weight: Tensor, heading: Tensor,
    out_weight: Tensor, out_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Shapes as in the op; all contiguous."""
    (points, c), out = q.shape, torch.empty_like(q)
    if points:
        half = q.dtype != torch.float32
        rows = 64 if half else 32
        ray_query_kernel[(triton.cdiv(points, rows),)](
            q, origin, direction, depths, query_weight, place_weight, heading, out_weight, out_bias, out, points, len(depths),
            C=c, FAST=half and not interpreting(), PRECISION="tf32" if half else "tf32x3", BM=rows, num_warps=4,
        )  # fmt: skip
    return out
