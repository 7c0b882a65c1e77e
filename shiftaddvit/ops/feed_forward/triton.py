"""A tile of rows: normalised once, then the hidden units 64 at a time, made and used up in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_columns, normalised_rows
from ..tiling import Tile, key, tuned


@triton.jit
def feed_forward_kernel(
    x, gamma, beta, w1, b1, w2, b2, router1, router2, out, M, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND are the experts of the two linears."""
    T: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    cs = tl.arange(0, C)
    rows = m[:, None].to(tl.int64) * C + cs[None, :]
    inside = (m < M)[:, None] & (cs < C)[None, :]
    a = normalised_rows(tl.load(x + rows, mask=inside, other=0.0).to(tl.float32), inside, C, eps)
    a = a * tl.load(gamma + cs).to(tl.float32)[None, :] + tl.load(beta + cs).to(tl.float32)[None, :]
    if FIRST == 2:
        lead = tl.load(router1 + C + cs).to(tl.float32) - tl.load(router1 + cs).to(tl.float32)
        other1 = tl.sum(a * lead[None, :], 1) > 0
    a = a.to(T)
    acc = tl.zeros((BM, C), tl.float32)
    if SECOND == 2:
        acc2 = tl.zeros((BM, C), tl.float32)
        lead2 = tl.zeros((BM,), tl.float32)
    for start in tl.range(0, HIDDEN, BH, num_stages=STAGES):
        hs = start + tl.arange(0, BH)
        h = tl.dot(a, load_columns(w1, hs, 0, HIDDEN, C, C, T), input_precision=PRECISION) + tl.load(b1 + hs).to(tl.float32)[None, :]
        if FIRST == 2:
            second = tl.dot(a, load_columns(w1 + HIDDEN * C, hs, 0, HIDDEN, C, C, T), input_precision=PRECISION)
            h = tl.where(other1[:, None], second + tl.load(b1 + HIDDEN + hs).to(tl.float32)[None, :], h)
        h = tl.maximum(h, 0.0)
        if SECOND == 2:
            step = tl.load(router2 + HIDDEN + hs).to(tl.float32) - tl.load(router2 + hs).to(tl.float32)
            lead2 += tl.sum(h * step[None, :], 1)
        h = h.to(T)
        acc = tl.dot(h, load_columns(w2, cs, start, C, HIDDEN, BH, T), acc, input_precision=PRECISION)
        if SECOND == 2:
            acc2 = tl.dot(h, load_columns(w2 + C * HIDDEN, cs, start, C, HIDDEN, BH, T), acc2, input_precision=PRECISION)
    y = acc + tl.load(b2 + cs).to(tl.float32)[None, :]
    if SECOND == 2:
        y = tl.where((lead2 > 0)[:, None], acc2 + tl.load(b2 + C + cs).to(tl.float32)[None, :], y)
    y = y + tl.load(x + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(T), mask=inside)


def feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    router1: Tensor | None, router2: Tensor | None,
) -> Tensor:  # fmt: skip
    """x (M, C), weights (E, out, in), biases (E, out)."""
    (m, c), out = x.shape, torch.empty_like(x)
    if m:
        half = x.dtype != torch.float32
        experts = f"{weight1.shape[0]}{weight2.shape[0]}"
        tile = tuned(x.device, key(f"feed_forward{experts}", c, weight1.shape[1])) if half else None
        tile = tile or (Tile(128, c, 64, 8, 2) if half and c <= 64 else Tile(32, c, 64, 4, 2 if half else 1))
        feed_forward_kernel[(triton.cdiv(m, tile.m),)](
            x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, router1, router2, out, m, eps,
            C=c, HIDDEN=weight1.shape[1], FIRST=weight1.shape[0], SECOND=weight2.shape[0],
            PRECISION="tf32" if half else "tf32x3", BM=tile.m, BH=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out
