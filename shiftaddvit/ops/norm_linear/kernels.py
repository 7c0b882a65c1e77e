"""LayerNorm, router and linear in one kernel for rows kept whole; linear and router for wide ones, whose norm is a kernel of its own."""

import triton
import triton.language as tl

from ..tiles import complete, load_columns, normalised_rows, store_tile, wait_for_inputs


@triton.jit
def norm_linear_kernel(
    x, gamma, beta, w, bias, router, residual, out, out_scale, choice, M, N, K, stride_x, eps,
    NORM: tl.constexpr, EXPERTS: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_CHOICE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of at most BK channels: normalised and routed once, then TILES output tiles of BN channels."""
    groups = tl.cdiv(N, BN * TILES)
    group = tl.program_id(0) % groups
    m = (tl.program_id(0) // groups) * BM + tl.arange(0, BM)
    ks = tl.arange(0, BK)
    inside = (m[:, None] < M) & (ks[None, :] < K)
    # What does not come from the kernel before this one is loaded before the wait.
    if TILES == 1:
        n = group * BN + tl.arange(0, BN)
        weight = load_columns(w, n, 0, N, K, BK, T)
        if EXPERTS == 2:
            weight2 = load_columns(w + N * K, n, 0, N, K, BK, T)
    if EXPERTS == 2:
        route = tl.load(router + ks, mask=ks < K, other=0.0).to(tl.float32)
        for part in tl.static_range(1, 3):
            route += tl.load(router + part * K + ks, mask=ks < K, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(gamma + ks, mask=ks < K, other=0.0).to(tl.float32)
        shift = tl.load(beta + ks, mask=ks < K, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    a = tl.load(x + m[:, None].to(tl.int64) * stride_x + ks[None, :], mask=inside, other=0.0)
    if NORM:
        a = normalised_rows(a.to(tl.float32), inside, K, eps) * scale[None, :] + shift[None, :]
    a = a.to(T)
    second = m < 0
    if EXPERTS == 2:
        second = tl.sum(a.to(tl.float32) * route[None, :], 1) > 0
        if HAS_CHOICE:
            tl.store(choice + m, second.to(tl.int8), mask=m < tl.where(group == 0, M, 0))
        # Each expert gets its own rows and zeros for the others', so that one sum serves both.
        a2 = tl.where(second[:, None], a, 0.0).to(T)
        a = tl.where(second[:, None], 0.0, a).to(T)
    for t in tl.range(0, TILES, num_stages=STAGES):
        n = (group * TILES + t) * BN + tl.arange(0, BN)
        if TILES > 1:
            weight = load_columns(w, n, 0, N, K, BK, T)
            if EXPERTS == 2:
                weight2 = load_columns(w + N * K, n, 0, N, K, BK, T)
        acc = tl.dot(a, weight, input_precision=PRECISION)
        if EXPERTS == 2:
            acc = tl.dot(a2, weight2, acc, input_precision=PRECISION)
        acc = complete(acc, m, n, second, bias, residual, M, N, EXPERTS, GELU, FAST, HAS_BIAS, HAS_RESIDUAL)
        store_tile(out, acc, m, n, M, N, out_scale, INT8)


@triton.jit
def wide_linear_kernel(
    x, w, bias, router, residual, out, out_scale, choice, M, N, K, stride_x,
    EXPERTS: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_CHOICE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any width, chunk by chunk, the next ones on their way; the router is one more product, so that nothing but products reads
    the rows."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    rows = x + m[:, None].to(tl.int64) * stride_x
    wait_for_inputs(PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    second = m < 0
    if EXPERTS == 2:
        other = tl.zeros((BM, BN), tl.float32)
        lead = tl.zeros((BM, 16), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        a = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0).to(T)
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
