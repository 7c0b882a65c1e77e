"""A mixture of two linear experts without a host sync: both products and a row select, or rows sorted within windows."""

import triton
import triton.language as tl

from ..tiles import load_columns, wait_for_inputs


@triton.jit
def _with_extra(acc, extra, plus, m, n, inside, N):
    """acc + extra (M, 2) · plus (2, N)."""
    for i in tl.static_range(2):
        column = tl.load(extra + 2 * m + i, mask=inside, other=0.0)
        acc += column[:, None] * tl.load(plus + i * N + n, mask=n < N, other=0.0)[None, :]
    return acc


@triton.jit
def dual_kernel(
    x, index, gate, w, bias, extra, plus, out, M, N, K, stride_x,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both experts' products for every row, from one reading of x; each row keeps its own."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    T: tl.constexpr = x.dtype.element_ty
    rows = x + m[:, None].to(tl.int64) * stride_x
    acc = tl.zeros((BM, BN), tl.float32)
    other = tl.zeros((BM, BN), tl.float32)
    wait_for_inputs(PDL)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        a = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0)
        acc = tl.dot(a, load_columns(w, n, k, N, K, BK, T), acc, input_precision=PRECISION)
        other = tl.dot(a, load_columns(w + N * K, n, k, N, K, BK, T), other, input_precision=PRECISION)
    second = tl.load(index + m, mask=m < M, other=0) == 1
    acc = tl.where(second[:, None], other, acc)
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc + tl.where(second[:, None], tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :], shift)
    if HAS_GATE:
        acc = acc * tl.load(gate + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    if HAS_EXTRA:
        acc = _with_extra(acc, extra, plus, m, n, m < M, N)
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(where, acc.to(T), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def order_kernel(
    x, router, index, order, firsts, M, K, stride_x, ROUTE: tl.constexpr, WINDOW: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr
):
    """Sort one window of rows by expert, stably, by counting: `order` lists the first expert's rows, then the second's.

    With ROUTE the expert is decided here, from x and the router, and written to `index`; otherwise it is read from there.
    """
    window = tl.program_id(0)
    i = tl.arange(0, WINDOW)
    m = window * WINDOW + i
    inside = m < M
    wait_for_inputs(PDL)
    if ROUTE:
        lead = tl.zeros((WINDOW,), tl.float32)
        for k in tl.range(0, K, BK, num_stages=1):
            ks = k + tl.arange(0, BK)
            where = x + m[:, None].to(tl.int64) * stride_x + ks[None, :]
            a = tl.load(where, mask=inside[:, None] & (ks[None, :] < K), other=0.0).to(tl.float32)
            r = tl.load(router + K + ks, mask=ks < K, other=0.0).to(tl.float32)
            r = r - tl.load(router + ks, mask=ks < K, other=0.0).to(tl.float32)
            lead += tl.sum(a * r[None, :], 1)
        second = (lead > 0).to(tl.int32)
        tl.store(index + m, second.to(tl.int8), mask=inside)
    else:
        second = (tl.load(index + m, mask=inside, other=0) == 1).to(tl.int32)
    one = tl.where(inside, 1 - second, 0)
    two = tl.where(inside, second, 0)
    count = tl.sum(one, 0)
    place = tl.where(second == 1, count + tl.cumsum(two, 0) - two, tl.cumsum(one, 0) - one)
    tl.store(order + window * WINDOW + place, m, mask=inside)
    tl.store(firsts + window, count)


@triton.jit
def partition_kernel(
    x, order, firsts, gate, w, bias, extra, plus, out, M, N, K, stride_x,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One expert's product for a run of sorted rows. Only the run in which a window changes expert is computed for both."""
    tiles_n = tl.cdiv(N, BN)
    run = tl.program_id(0) // tiles_n
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    slot = run * BM + tl.arange(0, BM)
    window = (run * BM) // WINDOW
    T: tl.constexpr = x.dtype.element_ty
    wait_for_inputs(PDL)
    border = window * WINDOW + tl.load(firsts + window)
    m = tl.load(order + slot, mask=slot < M, other=0)
    rows = x + m[:, None].to(tl.int64) * stride_x
    from_expert = tl.where(run * BM < border, 0, 1)
    to_expert = tl.where(tl.minimum(run * BM + BM, M) > border, 2, 1)
    for expert in tl.range(from_expert, to_expert, num_stages=1):
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ks = k + tl.arange(0, BK)
            a = tl.load(rows + ks[None, :], mask=(slot[:, None] < M) & (ks[None, :] < K), other=0.0)
            acc = tl.dot(a, load_columns(w + expert * N * K, n, k, N, K, BK, T), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc = acc + tl.load(bias + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if HAS_GATE:
            acc = acc * tl.load(gate + m, mask=slot < M, other=0.0).to(tl.float32)[:, None]
        if HAS_EXTRA:
            acc = _with_extra(acc, extra, plus, m, n, slot < M, N)
        mine = (slot < M) & ((slot >= border) == (expert == 1))
        where = out + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(where, acc.to(T), mask=mine[:, None] & (n[None, :] < N))
