"""What training a mixture needs beside the experts' products: logits, the gradients of logits, and those of weights."""

import triton
import triton.language as tl


@triton.jit
def route_kernel(x, router, noise, clean, index, M, K, stride_x, HAS_NOISE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Both logits of every row, and which is larger with noise."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = m < M
    first = tl.zeros((BM,), tl.float32)
    second = tl.zeros((BM,), tl.float32)
    for k in tl.range(0, K, BK, num_stages=1):
        ks = k + tl.arange(0, BK)
        a = tl.load(x + m[:, None].to(tl.int64) * stride_x + ks[None, :], mask=inside[:, None] & (ks[None, :] < K), other=0.0).to(tl.float32)
        first += tl.sum(a * tl.load(router + ks, mask=ks < K, other=0.0)[None, :], 1)
        second += tl.sum(a * tl.load(router + K + ks, mask=ks < K, other=0.0)[None, :], 1)
    tl.store(clean + 2 * m, first, mask=inside)
    tl.store(clean + 2 * m + 1, second, mask=inside)
    if HAS_NOISE:
        first += tl.load(noise + 2 * m, mask=inside, other=0.0)
        second += tl.load(noise + 2 * m + 1, mask=inside, other=0.0)
    tl.store(index + m, (second - first > 0).to(tl.int8), mask=inside)


@triton.jit
def steps_kernel(
    grad, y, grad_clean, clean, noise, index, steps, M, N, stride_g, HAS_NOISE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr
):
    """The gradient of every row's logits: what reaches them themselves, and ±⟨grad, y⟩ (1 − p_e) through the gate."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = m < M
    dot = tl.zeros((BM,), tl.float32)
    for n in tl.range(0, N, BN, num_stages=STAGES):
        ns = n + tl.arange(0, BN)
        mask = inside[:, None] & (ns[None, :] < N)
        g = tl.load(grad + m[:, None].to(tl.int64) * stride_g + ns[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(g * tl.load(y + m[:, None].to(tl.int64) * N + ns[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    first = tl.load(clean + 2 * m, mask=inside, other=0.0)
    second = tl.load(clean + 2 * m + 1, mask=inside, other=0.0)
    if HAS_NOISE:
        first += tl.load(noise + 2 * m, mask=inside, other=0.0)
        second += tl.load(noise + 2 * m + 1, mask=inside, other=0.0)
    step = dot / (1.0 + tl.exp(tl.abs(second - first)))
    step = tl.where(tl.load(index + m, mask=inside, other=0) == 1, -step, step)
    tl.store(steps + 2 * m, tl.load(grad_clean + 2 * m, mask=inside, other=0.0) + step, mask=inside)
    tl.store(steps + 2 * m + 1, tl.load(grad_clean + 2 * m + 1, mask=inside, other=0.0) - step, mask=inside)


@triton.jit
def weight_grad_kernel(
    grad, x, index, steps, out, M, N, K, stride_g, stride_x, rows, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over `rows` rows, of both experts from one reading: weights (2, N, K), then biases (2, N), then the router (2, K)."""
    tiles_k = tl.cdiv(K, BK)
    tiles = tl.cdiv(N, BN) * tiles_k
    part = tl.program_id(0) // tiles
    tile_n = (tl.program_id(0) % tiles) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    n = tile_n * BN + tl.arange(0, BN)
    k = tile_k * BK + tl.arange(0, BK)
    T: tl.constexpr = x.dtype.element_ty
    first = tl.zeros((BN, BK), tl.float32)
    second = tl.zeros((BN, BK), tl.float32)
    bias = tl.zeros((BN,), tl.float32)
    other_bias = tl.zeros((BN,), tl.float32)
    router = tl.zeros((BK,), tl.float32)
    other_router = tl.zeros((BK,), tl.float32)
    end = tl.minimum(part * rows + rows, M)
    for start in tl.range(part * rows, end, BM, num_stages=STAGES):
        m = start + tl.arange(0, BM)
        inside = m < end
        to_second = tl.load(index + m, mask=inside, other=0) == 1
        g = tl.load(grad + n[:, None] + m[None, :].to(tl.int64) * stride_g, mask=(n[:, None] < N) & inside[None, :], other=0.0).to(T)
        a = tl.load(x + m[:, None].to(tl.int64) * stride_x + k[None, :], mask=inside[:, None] & (k[None, :] < K), other=0.0)
        one = tl.where(to_second[None, :], 0.0, g).to(T)
        two = tl.where(to_second[None, :], g, 0.0).to(T)
        first = tl.dot(one, a, first, input_precision=PRECISION)
        second = tl.dot(two, a, second, input_precision=PRECISION)
        if tile_k == 0:
            bias += tl.sum(one.to(tl.float32), 1)
            other_bias += tl.sum(two.to(tl.float32), 1)
        if tile_n == 0:
            wide = a.to(tl.float32)
            router += tl.sum(wide * tl.load(steps + 2 * m, mask=inside, other=0.0)[:, None], 0)
            other_router += tl.sum(wide * tl.load(steps + 2 * m + 1, mask=inside, other=0.0)[:, None], 0)
    out += part.to(tl.int64) * (2 * N * K + 2 * N + 2 * K)
    mask = (n[:, None] < N) & (k[None, :] < K)
    tl.store(out + n[:, None] * K + k[None, :], first, mask=mask)
    tl.store(out + (N + n[:, None]) * K + k[None, :], second, mask=mask)
    if tile_k == 0:
        tl.store(out + 2 * N * K + n, bias, mask=n < N)
        tl.store(out + 2 * N * K + N + n, other_bias, mask=n < N)
    if tile_n == 0:
        tl.store(out + 2 * N * K + 2 * N + k, router, mask=k < K)
        tl.store(out + 2 * N * K + 2 * N + K + k, other_router, mask=k < K)
