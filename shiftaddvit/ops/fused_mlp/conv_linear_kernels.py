"""Depthwise 3×3 convolution, GELU, router, linear and residual in one kernel."""

import triton
import triton.language as tl

from ..tiles import complete, gelu, load_columns, normalised_rows, store_tile, wait_for_inputs


@triton.jit
def _taps(h, conv, first, m, y, x, ks, M, K, H, W, BM: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr):
    """Σ over the 3×3 neighbours of token m of h · conv, conv (9, K), zero outside the picture."""
    columns = ks[None, :] < K
    # One 64-bit address for the program; inside the tile 32 bits reach everything.
    tile = h + first.to(tl.int64) * K
    offsets = (m - first)[:, None] * K + ks[None, :]
    if HALF:
        total = tl.zeros((BM, BK), tl.float16)
    else:
        total = tl.zeros((BM, BK), tl.float32)
    for dy in tl.range(-1, 2, num_stages=1):
        for dx in tl.range(-1, 2, num_stages=1):
            near = (m < M) & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            value = tl.load(tile + (offsets + (dy * W + dx) * K), mask=near[:, None] & columns, other=0)
            factor = tl.load(conv + (dy * 3 + dx + 4) * K + ks, mask=ks < K, other=0.0)
            if HALF:
                total = tl.inline_asm_elementwise(
                    "fma.rn.f16x2 $0, $1, $2, $3;",
                    "=r,r,r,r",
                    [value, tl.broadcast_to(factor.to(tl.float16)[None, :], (BM, BK)), total],
                    dtype=tl.float16,
                    is_pure=True,
                    pack=2,
                )
            else:
                total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    return total.to(tl.float32)


@triton.jit
def conv_linear_kernel(
    h, h_scale, conv, conv_bias, w, bias, router, residual, gamma, beta, out, choice, M, N, K, H, W, eps,
    EXPERTS: tl.constexpr, FAST: tl.constexpr, HALF: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_CHOICE: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = [LayerNorm](residual + Expert(GELU(conv3×3(h) + conv_bias))); the activated hidden tile exists in registers only."""
    tiles_n = tl.cdiv(N, BN)
    first = (tl.program_id(0) // tiles_n) * BM
    m = first + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    y = (m % (H * W)) // W
    x = m % W
    acc = tl.zeros((BM, BN), tl.float32)
    second = m < 0
    if EXPERTS == 2:
        other = tl.zeros((BM, BN), tl.float32)
        lead = tl.zeros((BM,), tl.float32)
    wait_for_inputs(PDL)
    # With more than one stage the taps would be copied to shared memory past the first-level cache, which serves 8 of the 9.
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        hidden = _taps(h, conv, first, m, y, x, ks, M, K, H, W, BM, BK, HALF)
        if HAS_SCALE:
            hidden = hidden * tl.load(h_scale + ks, mask=ks < K, other=0.0)[None, :]
        hidden = gelu(hidden + tl.load(conv_bias + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :], FAST)
        if EXPERTS == 2:
            r = tl.load(router + K + ks, mask=ks < K, other=0.0).to(tl.float32)
            r = r - tl.load(router + ks, mask=ks < K, other=0.0).to(tl.float32)
            lead += tl.sum(hidden * r[None, :], 1)
        a = hidden.to(T)
        acc = tl.dot(a, load_columns(w, n, k, N, K, BK, T), acc, input_precision=PRECISION)
        if EXPERTS == 2:
            other = tl.dot(a, load_columns(w + N * K, n, k, N, K, BK, T), other, input_precision=PRECISION)
    if EXPERTS == 2:
        second = lead > 0
        acc = tl.where(second[:, None], other, acc)
        if HAS_CHOICE:
            tl.store(choice + m, second.to(tl.int8), mask=m < tl.where(tl.program_id(0) % tiles_n == 0, M, 0))
    acc = complete(acc, m, n, second, bias, residual, M, N, EXPERTS, False, FAST, HAS_BIAS, HAS_RESIDUAL)
    if NORM:
        acc = normalised_rows(acc, (m[:, None] < M) & (n[None, :] < N), N, eps)
        acc = acc * tl.load(gamma + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc + tl.load(beta + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(out, acc, m, n, M, N, h_scale, False)
