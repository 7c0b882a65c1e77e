"""The feed-forward of a tile of rows, for its own kernel and for the ends of others."""

import triton
import triton.language as tl

from ..tiles import load_columns, normalised_rows


@triton.jit
def with_feed_forward(
    y, inside, gamma, beta, eps, w1, b1, w2, b2, router1, router2,
    C: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """y + fc2(relu(fc1(LayerNorm(y)))) of float32 rows (BM, C); FIRST and SECOND are the experts of the two linears. The hidden units are
    made and used up BH at a time."""
    cs = tl.arange(0, C)
    a = normalised_rows(y, inside, C, eps)
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
    fed = acc + tl.load(b2 + cs).to(tl.float32)[None, :]
    if SECOND == 2:
        fed = tl.where((lead2 > 0)[:, None], acc2 + tl.load(b2 + C + cs).to(tl.float32)[None, :], fed)
    return y + fed
