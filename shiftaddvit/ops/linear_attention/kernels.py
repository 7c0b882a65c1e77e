"""What lies between the two projections of a linear-attention block: two small kernels. v, the queries' codes and a few context sums
pass between them."""

import triton
import triton.language as tl

from ..tiles import wait_for_inputs


@triton.jit
def binary_codes(x, threshold, which, inside, RULE: tl.constexpr, LOW: tl.constexpr, D: tl.constexpr):
    """1[x/‖x‖ > threshold] as {LOW, 1}, and 0 outside. The token's own mean and zero do not depend on the length, which is left out."""
    if RULE == "token":
        level = tl.sum(x, 1) / D
    elif RULE == "zero":
        level = tl.sum(x, 1) * 0.0
    else:
        level = tl.load(threshold + which) * tl.sqrt(tl.sum(x * x, 1) + 1e-12)
    return tl.where(inside[:, None], tl.where(x > level[:, None], 1.0, LOW), 0.0)


@triton.jit
def unit_rows(x):
    return x * tl.rsqrt(tl.sum(x * x, 1) + 1e-12)[:, None]


@triton.jit
def packed(codes, BM: tl.constexpr, D: tl.constexpr):
    """(BM, ⌈D/32⌉) words of (BM, D) codes: bit i mod 32 of word i // 32 is set where code i is positive."""
    WORDS: tl.constexpr = (D + 31) // 32
    bit = (codes > 0).to(tl.int32) << (tl.arange(0, D) % 32)[None, :]
    return tl.sum(tl.reshape(bit, (BM, WORDS, D // WORDS)), 2).to(tl.int32)


@triton.jit
def sum_parts(context, first, parts, heads, D: tl.constexpr, AT_ONCE: tl.constexpr):
    """Σ over the parts of one head's (D, D) context, in a fixed order, several loads in flight."""
    i = tl.arange(0, D)
    here = context + i[:, None] * D + i[None, :]
    total = tl.zeros((D, D), tl.float32)
    for p in tl.range(0, parts, AT_ONCE, num_stages=1):
        for q in tl.static_range(AT_ONCE):
            total += tl.load(here + (first + (p + q) * heads) * (D * D), mask=i[:, None] < (parts - p - q) * D, other=0.0)
    return total


@triton.jit
def sum_rows(sums, first, parts, heads, D: tl.constexpr):
    """The same for one vector a head."""
    i = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    for p in tl.range(0, parts, num_stages=1):
        total += tl.load(sums + (first + p * heads) * D + i)
    return total


@triton.jit
def context_kernel(
    qkv, threshold, queries, context, v_sum, k_sum, N, C, stride, parts, heads,
    SHARED: tl.constexpr, RULE: tl.constexpr, CODES: tl.constexpr, V_SUM: tl.constexpr, K_SUM: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one picture's part: codes of q, and Σ_j k_jᵀ v_j over the part's tokens. `qkv` has rows of q, k and v (or of q and v)."""
    pid = tl.program_id(0)
    head = pid % heads
    part = (pid // heads) % parts
    picture = pid // (heads * parts)
    T: tl.constexpr = qkv.dtype.element_ty
    LOW: tl.constexpr = -1.0 if CODES == "plus-minus" else 0.0
    i = tl.arange(0, D)
    tiles = tl.cdiv(tl.cdiv(N, BM), parts)
    total = tl.zeros((D, D), tl.float32)
    v_total = tl.zeros((D,), tl.float32)
    k_total = tl.zeros((D,), tl.float32)
    rows = qkv + picture.to(tl.int64) * N * stride + head * D
    first = (picture.to(tl.int64) * heads + head) * N
    wait_for_inputs(PDL)
    for t in tl.range(part * tiles, part * tiles + tiles, num_stages=STAGES):
        m = t * BM + tl.arange(0, BM)
        inside = m < N
        here = rows + m[:, None] * stride + i[None, :]
        q = tl.load(here, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(here + (C if SHARED else 2 * C), mask=inside[:, None], other=0.0)
        k = q
        if not SHARED:
            k = tl.load(here + C, mask=inside[:, None], other=0.0).to(tl.float32)
        if CODES == "float":
            tl.store(queries + (first + m)[:, None] * D + i[None, :], unit_rows(q).to(T), mask=inside[:, None])
            k = unit_rows(k)
        else:
            WORDS: tl.constexpr = (D + 31) // 32
            word = packed(binary_codes(q, threshold, head, inside, RULE, LOW, D), BM, D)
            tl.store(queries + (first + m)[:, None] * WORDS + tl.arange(0, WORDS)[None, :], word, mask=inside[:, None])
            k = binary_codes(k, threshold, heads + head, inside, RULE, LOW, D)
        k = k.to(T)
        total = tl.dot(tl.trans(k), v, total, input_precision=PRECISION)
        if V_SUM:
            v_total += tl.sum(v.to(tl.float32), 0)
        if K_SUM:
            k_total += tl.sum(k.to(tl.float32), 0)
    where = (picture * parts + part) * heads + head
    tl.store(context + where * (D * D) + i[:, None] * D + i[None, :], total)
    if V_SUM:
        tl.store(v_sum + where * D + i, v_total)
    if K_SUM:
        tl.store(k_sum + where * D + i, k_total)


@triton.jit
def _band(taps, beside, tokens, WINDOW: tl.constexpr):
    """(tokens, beside) matrix that convolves tokens: the tap between the two, and nothing beyond the window."""
    tap = beside[None, :] - tokens[:, None] + WINDOW // 2
    return tl.load(taps + tap, mask=(tap >= 0) & (tap < WINDOW), other=0.0).to(tl.float32)


@triton.jit
def _times_parts(matrix, x, acc, T: tl.constexpr, PRECISION: tl.constexpr):
    """acc + matrix · x, the float32 matrix as the sum of two of T, which keeps its precision."""
    high = matrix.to(T)
    acc = tl.dot(high, x, acc, input_precision=PRECISION)
    if T != tl.float32:
        acc = tl.dot((matrix - high.to(tl.float32)).to(T), x, acc)
    return acc


@triton.jit
def apply_kernel(
    queries, v, context, v_sum, k_sum, conv, out, N, C, stride, parts, heads, context_scale, local_sum, prefix,
    CODES: tl.constexpr, LOCAL: tl.constexpr, OUTPUT: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, EDGE: tl.constexpr,
    AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = normalised(local + q Σ kᵀv · scale/π) + token convolution of v, for one head and a run of TILES tiles of one picture's tokens.

    The convolution is a product of v with a matrix over the tile's tokens, a band, and of the tile's EDGE neighbours on either side with a
    second one. So v goes to the matrix units as it was loaded.
    """
    tiles = tl.cdiv(N, BM)
    runs = tl.cdiv(tiles, TILES)
    pid = tl.program_id(0)
    head = pid % heads
    start = ((pid // heads) % runs) * TILES
    picture = pid // (heads * runs)
    T: tl.constexpr = v.dtype.element_ty
    i = tl.arange(0, D)
    r = tl.arange(0, BM)
    e = tl.arange(0, 2 * EDGE)
    # The edge rows' places, counted from the tile's first token.
    beside = tl.where(e < EDGE, e - EDGE, BM + e - EDGE)
    if WINDOW > 0:
        taps = conv + head * WINDOW
        near = _band(taps, r, r, WINDOW)
        far = _band(taps, beside, r, WINDOW)
        middle = tl.load(taps + WINDOW // 2).to(tl.float32)
    rows = v + picture.to(tl.int64) * N * stride + head * D
    wait_for_inputs(PDL)
    first = picture * parts * heads + head
    # Divided by the number of tokens, the context stays in the range of half precision.
    sums = sum_parts(context, first, parts, heads, D, AT_ONCE) / N
    high = sums.to(T)
    low = (sums - high.to(tl.float32)).to(T)
    if LOCAL == "mean":
        mean = (0.5 / N) * sum_rows(v_sum, first, parts, heads, D)
    if OUTPUT == "similarity":
        # ½ + q·k/π summed over all keys, in the units of o.
        keys = sum_rows(k_sum, first, parts, heads, D) / N
    for t in tl.range(start, tl.minimum(start + TILES, tiles), num_stages=STAGES):
        m = t * BM + r
        inside = m < N
        place = (picture.to(tl.int64) * heads + head) * N + m
        if CODES == "float":
            q = tl.load(queries + place[:, None] * D + i[None, :], mask=inside[:, None], other=0.0)
        else:
            # As many places as four warps have threads, most of them masked: of fewer the compiler lets every thread read all words.
            WORDS: tl.constexpr = (D + 31) // 32
            w = tl.arange(0, max(WORDS, 128 // BM))
            words = tl.load(queries + place[:, None] * WORDS + w[None, :], mask=inside[:, None] & (w[None, :] < WORDS), other=0)
            word = tl.sum(tl.where(w[None, :] == 0, words, 0), 1)[:, None]
            for n in tl.static_range(1, WORDS):
                word = tl.where((i < 32 * n)[None, :], word, tl.sum(tl.where(w[None, :] == n, words, 0), 1)[:, None])
            q = tl.where((word & (1 << (i % 32))[None, :]) != 0, 1.0, -1.0 if CODES == "plus-minus" else 0.0).to(T)
        o = tl.dot(q, high, input_precision=PRECISION)
        if T != tl.float32:
            o = tl.dot(q, low, o)
        o = o * context_scale
        here = rows + m[:, None] * stride + i[None, :]
        own = tl.load(here, mask=inside[:, None], other=0.0)
        if LOCAL == "own":
            o = o + 0.5 * own.to(tl.float32)
        elif LOCAL == "mean":
            o = o + mean[None, :]
        if OUTPUT == "l2":
            o = unit_rows(o)
        elif OUTPUT == "similarity":
            o = o / (local_sum + tl.sum(q.to(tl.float32) * keys[None, :], 1) * context_scale)[:, None]
        if WINDOW > 0:
            j = t * BM + beside
            reached = (j >= prefix) & (j < N)
            edges = tl.load(rows + j[:, None] * stride + i[None, :], mask=reached[:, None], other=0.0)
            if PREFIX:
                # A prefix token has no neighbours in the raster, and is nobody's.
                raster = m >= prefix
                alone = o + middle * own.to(tl.float32)
                o = _times_parts(near, tl.load(here, mask=(inside & raster)[:, None], other=0.0), o, T, PRECISION)
                o = tl.where(raster[:, None], _times_parts(far, edges, o, T, PRECISION), alone)
            else:
                o = _times_parts(near, own, o, T, PRECISION)
                o = _times_parts(far, edges, o, T, PRECISION)
        to = out + (picture.to(tl.int64) * N + m)[:, None] * C + (head * D + i)[None, :]
        tl.store(to, o.to(T), mask=inside[:, None])
