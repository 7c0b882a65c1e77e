"""The two kernels of a linear-attention block in its fused form. Between them only v, the queries' codes and a few context sums touch
memory."""

import triton
import triton.language as tl

from ..tiles import complete, load_columns, normalised_rows, row_statistics, store_tile, wait_for_inputs


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
def _shift(first, other, second, EXPERTS: tl.constexpr):
    """The bias of each row's expert."""
    shift = first.to(tl.float32)[None, :]
    if EXPERTS == 2:
        shift = tl.where(second[:, None], other.to(tl.float32)[None, :], shift)
    return shift


@triton.jit
def _difference(router, cs, C):
    """By how much the second expert's logit leads, per unit of the channels cs."""
    total = tl.load(router + cs, mask=cs < C, other=0.0).to(tl.float32)
    for part in tl.static_range(1, 3):
        total += tl.load(router + part * C + cs, mask=cs < C, other=0.0).to(tl.float32)
    return total


@triton.jit
def _chosen(a, w, w2, second, EXPERTS: tl.constexpr, PRECISION: tl.constexpr):
    """Rows times the weights of each row's expert."""
    y = tl.dot(a, w, input_precision=PRECISION)
    if EXPERTS == 2:
        y = tl.where(second[:, None], tl.dot(a, w2, input_precision=PRECISION), y)
    return y


@triton.jit
def encode_kernel(
    x, gamma, beta, w, bias, router, threshold, queries, v_out, context, v_sum, k_sum, choice, N, C, C3, stride_x, stride_v, eps, parts, heads,
    NORM: tl.constexpr, EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED: tl.constexpr, RULE: tl.constexpr,
    CODES: tl.constexpr, V_SUM: tl.constexpr, K_SUM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    WHOLE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one picture's part: LayerNorm, q k v, codes of q, v, and Σ_j k_jᵀ v_j over the part's tokens.

    Parts are contiguous runs of whole tiles, so the sums do not depend on what else is in the batch.
    """
    pid = tl.program_id(0)
    head = pid % heads
    part = (pid // heads) % parts
    picture = pid // (heads * parts)
    T: tl.constexpr = x.dtype.element_ty
    LOW: tl.constexpr = -1.0 if CODES == "plus-minus" else 0.0
    i = tl.arange(0, D)
    q_row = head * D
    k_row = q_row if SHARED else C + head * D
    v_row = (C if SHARED else 2 * C) + head * D
    tiles = tl.cdiv(tl.cdiv(N, BM), parts)
    total = tl.zeros((D, D), tl.float32)
    v_total = tl.zeros((D,), tl.float32)
    k_total = tl.zeros((D,), tl.float32)
    second_w = w + (EXPERTS - 1) * C3 * C
    if WHOLE:
        # Read before the loop: inside it, the pipeline would fetch them again with every tile.
        cs = tl.arange(0, BK)
        if NORM:
            scale_by = tl.load(gamma + cs, mask=cs < C, other=0.0).to(tl.float32)
            shift_by = tl.load(beta + cs, mask=cs < C, other=0.0).to(tl.float32)
        w_q, w_v = load_columns(w, q_row + i, 0, C3, C, BK, T), load_columns(w, v_row + i, 0, C3, C, BK, T)
        other_q, other_v = w_q, w_v
        if EXPERTS == 2:
            other_q, other_v = load_columns(second_w, q_row + i, 0, C3, C, BK, T), load_columns(second_w, v_row + i, 0, C3, C, BK, T)
            leading = _difference(router, cs, C)
        if not SHARED:
            w_k = load_columns(w, k_row + i, 0, C3, C, BK, T)
            other_k = w_k
            if EXPERTS == 2:
                other_k = load_columns(second_w, k_row + i, 0, C3, C, BK, T)
    if HAS_BIAS:
        b_q, b_k, b_v = tl.load(bias + q_row + i), tl.load(bias + k_row + i), tl.load(bias + v_row + i)
        c_q, c_k, c_v = b_q, b_k, b_v
        if EXPERTS == 2:
            c_q, c_k, c_v = tl.load(bias + C3 + q_row + i), tl.load(bias + C3 + k_row + i), tl.load(bias + C3 + v_row + i)
    wait_for_inputs(PDL)
    # Narrow rows are read once and the next tile is fetched meanwhile; wide ones are read again, chunk by chunk, from the cache.
    for t in tl.range(part * tiles, part * tiles + tiles, num_stages=STAGES if WHOLE else 1):
        m = t * BM + tl.arange(0, BM)
        inside = m < N
        token = picture.to(tl.int64) * N + m
        rows = x + token[:, None] * stride_x
        second = m < 0
        if WHOLE:
            a = tl.load(rows + cs[None, :], mask=inside[:, None] & (cs[None, :] < C), other=0.0)
            if NORM:
                a = normalised_rows(a.to(tl.float32), inside[:, None] & (cs[None, :] < C), C, eps)
                a = a * scale_by[None, :] + shift_by[None, :]
            if EXPERTS == 2:
                second = tl.sum(a.to(tl.float32) * leading[None, :], 1) > 0
            a = a.to(T)
            q = _chosen(a, w_q, other_q, second, EXPERTS, PRECISION)
            v = _chosen(a, w_v, other_v, second, EXPERTS, PRECISION)
            if not SHARED:
                k = _chosen(a, w_k, other_k, second, EXPERTS, PRECISION)
        else:
            if NORM:
                mean, scale = row_statistics(rows, inside, C, eps, BM, BK)
            q = tl.zeros((BM, D), tl.float32)
            k = tl.zeros((BM, D), tl.float32)
            v = tl.zeros((BM, D), tl.float32)
            if EXPERTS == 2:
                lead = tl.zeros((BM,), tl.float32)
                q2 = tl.zeros((BM, D), tl.float32)
                k2 = tl.zeros((BM, D), tl.float32)
                v2 = tl.zeros((BM, D), tl.float32)
            for c in tl.range(0, C, BK, num_stages=STAGES):
                cs = c + tl.arange(0, BK)
                a = tl.load(rows + cs[None, :], mask=inside[:, None] & (cs[None, :] < C), other=0.0)
                if NORM:
                    a = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
                    a = a * tl.load(gamma + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
                    a = a + tl.load(beta + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
                if EXPERTS == 2:
                    lead += tl.sum(a.to(tl.float32) * _difference(router, cs, C)[None, :], 1)
                a = a.to(T)
                q = tl.dot(a, load_columns(w, q_row + i, c, C3, C, BK, T), q, input_precision=PRECISION)
                v = tl.dot(a, load_columns(w, v_row + i, c, C3, C, BK, T), v, input_precision=PRECISION)
                if not SHARED:
                    k = tl.dot(a, load_columns(w, k_row + i, c, C3, C, BK, T), k, input_precision=PRECISION)
                if EXPERTS == 2:
                    q2 = tl.dot(a, load_columns(second_w, q_row + i, c, C3, C, BK, T), q2, input_precision=PRECISION)
                    v2 = tl.dot(a, load_columns(second_w, v_row + i, c, C3, C, BK, T), v2, input_precision=PRECISION)
                    if not SHARED:
                        k2 = tl.dot(a, load_columns(second_w, k_row + i, c, C3, C, BK, T), k2, input_precision=PRECISION)
            if EXPERTS == 2:
                second = lead > 0
                q = tl.where(second[:, None], q2, q)
                v = tl.where(second[:, None], v2, v)
                k = tl.where(second[:, None], k2, k)
        if EXPERTS == 2:
            tl.store(choice + token, second.to(tl.int8), mask=m < tl.where(head == 0, N, 0))
        if HAS_BIAS:
            q = q + _shift(b_q, c_q, second, EXPERTS)
            v = v + _shift(b_v, c_v, second, EXPERTS)
            if not SHARED:
                k = k + _shift(b_k, c_k, second, EXPERTS)
        if SHARED:
            k = q
        v = tl.where(inside[:, None], v, 0.0).to(T)
        tl.store(v_out + token[:, None] * stride_v + (head * D + i)[None, :], v, mask=inside[:, None])
        place = (picture.to(tl.int64) * heads + head) * N + m
        if CODES == "float":
            tl.store(queries + place[:, None] * D + i[None, :], unit_rows(q).to(T), mask=inside[:, None])
            k = tl.where(inside[:, None], unit_rows(k), 0.0)
        else:
            q = binary_codes(q, threshold, head, inside, RULE, LOW, D)
            k = binary_codes(k, threshold, heads + head, inside, RULE, LOW, D)
            WORDS: tl.constexpr = (D + 31) // 32
            word = packed(q, BM, D)
            tl.store(queries + place[:, None] * WORDS + tl.arange(0, WORDS)[None, :], word, mask=inside[:, None])
        total = tl.dot(tl.trans(k.to(T)), v, total, input_precision=PRECISION)
        if V_SUM:
            v_total += tl.sum(v.to(tl.float32), 0)
        if K_SUM:
            k_total += tl.sum(k.to(T).to(tl.float32), 0)
    where = (picture * parts + part) * heads + head
    tl.store(context + where * (D * D) + i[:, None] * D + i[None, :], total)
    if V_SUM:
        tl.store(v_sum + where * D + i, v_total)
    if K_SUM:
        tl.store(k_sum + where * D + i, k_total)


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
def mix_kernel(
    queries, v, context, v_sum, k_sum, conv, w, bias, router, residual, out, choice, N, C, stride_v, parts, heads, context_scale, local_sum,
    prefix,
    EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CODES: tl.constexpr, LOCAL: tl.constexpr,
    OUTPUT: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out = residual + Expert(concat over heads of normalised(local + q Σ kᵀv · scale/π) + token convolution of v)."""
    tiles_n = tl.cdiv(C, BN)
    tiles_m = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BN + tl.arange(0, BN)
    picture = pid // (tiles_n * tiles_m)
    m = ((pid // tiles_n) % tiles_m) * BM + tl.arange(0, BM)
    inside = m < N
    i = tl.arange(0, D)
    acc = tl.zeros((BM, BN), tl.float32)
    second = m < 0
    if EXPERTS == 2:
        other = tl.zeros((BM, BN), tl.float32)
        lead = tl.zeros((BM,), tl.float32)
    tokens = v + picture.to(tl.int64) * N * stride_v
    wait_for_inputs(PDL)
    for head in tl.range(0, heads, num_stages=1):
        first = picture * parts * heads + head
        # Divided by the number of tokens, the context stays in the range of half precision; two parts keep its precision.
        sums = sum_parts(context, first, parts, heads, D, AT_ONCE) / N
        place = (picture.to(tl.int64) * heads + head) * N + m
        if CODES == "float":
            q = tl.load(queries + place[:, None] * D + i[None, :], mask=inside[:, None], other=0.0)
        else:
            WORDS: tl.constexpr = (D + 31) // 32
            word = tl.load(queries + place[:, None] * WORDS + (i // 32)[None, :], mask=inside[:, None], other=0)
            q = ((word >> (i % 32)[None, :]) & 1).to(tl.float32)
            if CODES == "plus-minus":
                q = 2.0 * q - 1.0
            q = q.to(T)
        high = sums.to(T)
        o = tl.dot(q, high, input_precision=PRECISION)
        if T != tl.float32:
            o = tl.dot(q, (sums - high.to(tl.float32)).to(T), o)
        o = o * context_scale
        here = tokens + m[:, None] * stride_v + (head * D + i)[None, :]
        own = tl.load(here, mask=inside[:, None], other=0.0).to(tl.float32)
        if LOCAL == "own":
            o = o + 0.5 * own
        elif LOCAL == "mean":
            o = o + (0.5 / N) * sum_rows(v_sum, first, parts, heads, D)[None, :]
        if OUTPUT == "l2":
            o = unit_rows(o)
        elif OUTPUT == "similarity":
            # ½ + q·k/π summed over all keys, in the units of o.
            keys = sum_rows(k_sum, first, parts, heads, D) / N
            o = o / (local_sum + tl.sum(q.to(tl.float32) * keys[None, :], 1) * context_scale)[:, None]
        if WINDOW > 0:
            # A loop of the IR's own, so that the taps are summed in the layout that they are loaded in, and only the sum changes layout.
            near_by = tl.zeros((BM, D), tl.float32)
            for tap in tl.range(0, WINDOW, num_stages=1):
                j = m + (tap - WINDOW // 2)
                # A prefix token has no neighbours in the raster, and is nobody's.
                seen = inside & ((j == m) | ((m >= prefix) & (j >= prefix) & (j < N)))
                neighbour = tl.load(here + (tap - WINDOW // 2) * stride_v, mask=seen[:, None], other=0.0)
                near_by += tl.load(conv + head * WINDOW + tap).to(tl.float32) * neighbour.to(tl.float32)
            o = o + near_by
        if EXPERTS == 2:
            r = _difference(router, head * D + i, C)
            lead += tl.sum(o * r[None, :], 1)
        a = o.to(T)
        acc = tl.dot(a, load_columns(w, n, head * D, C, C, D, T), acc, input_precision=PRECISION)
        if EXPERTS == 2:
            other = tl.dot(a, load_columns(w + C * C, n, head * D, C, C, D, T), other, input_precision=PRECISION)
    base = picture.to(tl.int64) * N * C
    if EXPERTS == 2:
        second = lead > 0
        acc = tl.where(second[:, None], other, acc)
        tl.store(choice + picture.to(tl.int64) * N + m, second.to(tl.int8), mask=m < tl.where(pid % tiles_n == 0, N, 0))
    if HAS_RESIDUAL:
        residual = residual + base
    acc = complete(acc, m, n, second, bias, residual, N, C, EXPERTS, False, False, HAS_BIAS, HAS_RESIDUAL)
    store_tile(out + base, acc, m, n, N, C, context_scale, False)
