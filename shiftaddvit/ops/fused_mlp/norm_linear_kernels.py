"""LayerNorm, router and linear in one kernel, for narrow rows kept whole and for wide ones."""

import triton
import triton.language as tl

from ..tiles import complete, load_columns, normalised_rows, row_statistics, store_tile, wait_for_inputs


@triton.jit
def norm_linear_kernel(
    x, gamma, beta, w, bias, router, residual, out, out_scale, choice, M, N, K, stride_x, eps,
    NORM: tl.constexpr, EXPERTS: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_CHOICE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tiles of rows of at most BK channels, one after the other, times the weights of BN outputs, which stay in shared memory."""
    groups = tl.cdiv(N, BN)
    group = tl.program_id(0) % groups
    first = (tl.program_id(0) // groups) * ROWS
    n = group * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    # What does not come from the kernel before this one is loaded before the wait.
    weight = load_columns(w, n, 0, N, K, BK, T)
    if EXPERTS == 2:
        weight2 = load_columns(w + N * K, n, 0, N, K, BK, T)
        route = tl.load(router + ks, mask=ks < K, other=0.0).to(tl.float32)
        for part in tl.static_range(1, 3):
            route += tl.load(router + part * K + ks, mask=ks < K, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(gamma + ks, mask=ks < K, other=0.0).to(tl.float32)
        shift = tl.load(beta + ks, mask=ks < K, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    m = first * BM + tl.arange(0, BM)
    following = tl.load(x + m[:, None].to(tl.int64) * stride_x + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0)
    for r in tl.range(0, ROWS, num_stages=1):
        m = (first + r) * BM + tl.arange(0, BM)
        inside = (m[:, None] < M) & (ks[None, :] < K)
        a = following
        if ROWS > 1:
            # The next rows are on their way while these are multiplied.
            after = tl.where(r + 1 < ROWS, m + BM, M)
            pointers = x + after[:, None].to(tl.int64) * stride_x + ks[None, :]
            following = tl.load(pointers, mask=(after[:, None] < M) & (ks[None, :] < K), other=0.0)
        if NORM or EXPERTS == 2:
            a = a.to(tl.float32)
        if NORM:
            a = normalised_rows(a, inside, K, eps) * scale[None, :] + shift[None, :]
        second = m < 0
        if EXPERTS == 2:
            second = tl.sum(a * route[None, :], 1) > 0
            if HAS_CHOICE:
                tl.store(choice + m, second.to(tl.int8), mask=m < tl.where(group == 0, M, 0))
        a = a.to(T)
        acc = tl.dot(a, weight, input_precision=PRECISION)
        if EXPERTS == 2:
            acc = tl.where(second[:, None], tl.dot(a, weight2, input_precision=PRECISION), acc)
        acc = complete(acc, m, n, second, bias, residual, M, N, EXPERTS, GELU, FAST, HAS_BIAS, HAS_RESIDUAL)
        store_tile(out, acc, m, n, M, N, out_scale, INT8)


@triton.jit
def wide_norm_linear_kernel(
    x, gamma, beta, w, bias, router, residual, out, out_scale, choice, M, N, K, stride_x, eps,
    NORM: tl.constexpr, EXPERTS: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_CHOICE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any width: statistics first, then the product chunk by chunk; the second reading of x hits the cache."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    rows = x + m[:, None].to(tl.int64) * stride_x
    wait_for_inputs(PDL)
    if NORM:
        mean, scale = row_statistics(rows, m < M, K, eps, BM, BS)
    acc = tl.zeros((BM, BN), tl.float32)
    second = m < 0
    if EXPERTS == 2:
        other = tl.zeros((BM, BN), tl.float32)
        lead = tl.zeros((BM, 16), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        a = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0)
        if NORM:
            a = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
            a = a * tl.load(gamma + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
            a = a + tl.load(beta + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
        a = a.to(T)
        acc = tl.dot(a, load_columns(w, n, k, N, K, BK, T), acc, input_precision=PRECISION)
        if EXPERTS == 2:
            other = tl.dot(a, load_columns(w + N * K, n, k, N, K, BK, T), other, input_precision=PRECISION)
            lead = tl.dot(a, load_columns(router, tl.arange(0, 16), k, 16, K, BK, T), lead, input_precision=PRECISION)
    if EXPERTS == 2:
        second = tl.sum(lead, 1) > 0
        acc = tl.where(second[:, None], other, acc)
        if HAS_CHOICE:
            tl.store(choice + m, second.to(tl.int8), mask=m < tl.where(tl.program_id(0) % tiles_n == 0, M, 0))
    acc = complete(acc, m, n, second, bias, residual, M, N, EXPERTS, GELU, FAST, HAS_BIAS, HAS_RESIDUAL)
    store_tile(out, acc, m, n, M, N, out_scale, INT8)
