"""The second kernel: everything but the contexts. LayerNorm, the router and values are computed once more, which is cheaper than to write and
read them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..conv_mlp.kernels import _wait_for_inputs
from ..conv_mlp.pieces import _times, barrier
from .context import _head_weights, _norm_parts, _offsets, _routed, _routers, _tile
from .pieces import (
    _above, _add_product, _as_rows, _biases, _by_token, _by_warp, _column, _down, _end, _floats, _later, _lead, _neighbours, _operand, _pairs, _place, _product,
    _router, _shares, _split_rows, _split_tokens, _start, _transposed_product, _weights, rows_layout,
)  # fmt: skip


@gluon.jit
def _context(context, parts, HEADS: gl.constexpr, scale, shared: gl.constexpr, L: gl.constexpr):
    """One head's context transposed, summed over the parts in their order and scaled, as a float16 and the rest of it, another."""
    i = gl.arange(0, 32, gl.SliceLayout(1, L))[:, None] + gl.arange(0, 32, gl.SliceLayout(0, L))[None, :] * 32
    total = gl.full([32, 32], 0.0, gl.float32, L)
    for part in range(0, parts, 4):
        for more in gl.static_range(4):
            here = context + (part + more) * (HEADS * 1024)
            total += gl.load(here + i, mask=(i >= 0) & (part + more < parts), other=0.0)
    total *= scale
    upper = total.to(gl.float16)
    lower = (total - upper.to(gl.float32)).to(gl.float16)
    return gl.allocate_shared_memory(gl.float16, [32, 32], shared, upper), gl.allocate_shared_memory(gl.float16, [32, 32], shared, lower)


@gluon.jit
def _band(taps, first, second, WINDOW: gl.constexpr, shared: gl.constexpr, L: gl.constexpr):
    """(16, 16): the tap from each token of a tile to those of the groups of eight that start at `first` and `second`, in two float16 parts."""
    k = gl.arange(0, 16, gl.SliceLayout(0, L))
    tap = (gl.where(k < 8, k + first, k - 8 + second))[None, :] - gl.arange(0, 16, gl.SliceLayout(1, L))[:, None] + WINDOW // 2
    tap_value = gl.load(taps + tap, mask=(tap >= 0) & (tap < WINDOW), other=0.0)
    upper = tap_value.to(gl.float16)
    lower = (tap_value - upper.to(gl.float32)).to(gl.float16)
    return gl.allocate_shared_memory(gl.float16, [16, 16], shared, upper), gl.allocate_shared_memory(gl.float16, [16, 16], shared, lower)


@gluon.jit
def _queries(
    flags, own, other, weights, E: gl.constexpr, C: gl.constexpr, ZERO: gl.constexpr, SIGNED: gl.constexpr, T: gl.constexpr, GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """A head's codes of queries, as rows."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    R: gl.constexpr = 16 * WARPS * T
    L: gl.constexpr = rows_layout(8, WARPS, T)
    q = _as_rows(_product(flags, own, other, weights[2], weights[0], weights[1], E, C, T, GROUP, WARPS).to(gl.float16), 8, T, WARPS)
    if ZERO:
        level = gl.full([R, 4], 0.0, gl.float16, gl.SliceLayout(2, L))
    else:
        ones = gl.full([32, 8], 1.0, gl.float16, gl.DotOperandLayout(1, MMA, 2))
        total, _ = _column(mma_v2(_operand(q, 8, T, WARPS), ones, gl.full([R, 8], 0.0, gl.float32, MMA)), WARPS, T)
        level = gl.convert_layout(_down(total / 32), gl.SliceLayout(2, L), assert_trivial=True)
    code = _above(q, level[:, :, None])
    return code + code - gl.full([R, 4, 8], 1.0, gl.float16, L) if SIGNED else code


@gluon.jit
def _projected(
    tile, inside, gammas, betas, routes, eps, queries, values, X: gl.constexpr, E: gl.constexpr, HEADS: gl.constexpr, ZERO: gl.constexpr,
    SIGNED: gl.constexpr, C: gl.constexpr, T: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Of a tile, each head's codes of queries as rows, and its values as groups of eight tokens."""
    own, other, flags = _routed(tile, inside, gammas, betas, routes, eps, X, E, C, T, WARPS)
    codes, groups = (), ()
    for h in gl.static_range(HEADS):
        codes = codes + (_queries(flags, own, other, queries[h], E, C, ZERO, SIGNED, T, GROUP, WARPS),)
        v = _transposed_product(flags, own, other, values[h][2], values[h][0], values[h][1], E, C, T, WARPS)
        groups = groups + (_split_tokens(v, T, WARPS),)
    return codes, groups


@gluon.jit
def _attended(
    q, groups, contexts, bands, half, post, LOCAL: gl.constexpr, UNIT: gl.constexpr, WINDOW: gl.constexpr, T: gl.constexpr, GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """A head's output as rows in float16: ½ v + q · context, normalised, + token convolution. `groups` start eight tokens before q."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    OWN: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    LA: gl.constexpr = gl.DotOperandLayout(0, OWN, 2)
    R: gl.constexpr = 16 * WARPS * T
    here = _neighbours(groups, 1, 1, T, WARPS)
    acc = gl.full([R, 32], 0.0, gl.float32, MMA)
    if LOCAL:
        acc = _by_token(mma_v2(half.load(LA), here, _by_warp(acc, T, WARPS)), T, WARPS)
    a = _operand(q, 8, T, WARPS)
    acc = _add_product(a, contexts[0], _start(acc, 32, GROUP, WARPS), 32, GROUP, WARPS)
    acc = _end(_add_product(a, contexts[1], acc, 32, GROUP, WARPS), GROUP, WARPS)
    if UNIT:
        o = _as_rows(acc, 8, T, WARPS)
        square = gl.sum(gl.sum(o * o, 2), 1)
        acc = acc * gl.convert_layout(post * gl.rsqrt(square * (post * post) + 1e-12), gl.SliceLayout(1, MMA), assert_trivial=True)[:, None]
    else:
        acc = acc * post
    if WINDOW > 0:
        acc = _by_warp(acc, T, WARPS)
        beside = _neighbours(groups, 0, 3, T, WARPS)
        acc = mma_v2(bands[0][0].load(LA), here, acc)
        acc = mma_v2(bands[0][1].load(LA), here, acc)
        acc = mma_v2(bands[1][0].load(LA), beside, acc)
        acc = _by_token(mma_v2(bands[1][1].load(LA), beside, acc), T, WARPS)
    return _as_rows(acc.to(gl.float16), 8, T, WARPS)


@gluon.jit(do_not_specialize=["steps", "programs", "parts"])
def attn_apply_kernel(
    x, gamma, beta, w1, b1, route1, context, conv, w2, b2, route2, out, N, steps, programs, parts, eps, scale, half, post,
    E1: gl.constexpr, E2: gl.constexpr, HEADS: gl.constexpr, OUT: gl.constexpr, ZERO: gl.constexpr, SIGNED: gl.constexpr, LOCAL: gl.constexpr,
    UNIT: gl.constexpr, WINDOW: gl.constexpr, T: gl.constexpr, GROUP: gl.constexpr, C: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The rest of the block for one of `programs` parts of a picture, steps · 16 · T tokens a warp."""
    L: gl.constexpr = rows_layout(C // 4, WARPS, T)
    LP: gl.constexpr = rows_layout(C // 8, WARPS, T)
    X: gl.constexpr = x.dtype.element_ty
    L8: gl.constexpr = rows_layout(8, WARPS, T)
    L2: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [WARPS, 1], [1, 0])
    L16: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    L4: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, WARPS], [0, 1])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    # Of one swizzle, whatever the width: see docs/performance.md for what two can do.
    WIDE: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    NARROW: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    R: gl.constexpr = 16 * WARPS * T
    picture, part = gl.program_id(0) // programs, gl.program_id(0) % programs

    back = _place(gl.arange(0, C, gl.SliceLayout(1, L2)), C)
    merged = gl.arange(0, 32, gl.SliceLayout(0, L2))
    queries, values, projections, contexts, bands, routes2 = (), (), (), (), (), ()
    for h in gl.static_range(HEADS):
        queries = queries + (_head_weights(w1, b1, 32 * h, E1, OUT, C, WIDE, NARROW, L2, L16),)
        values = values + (_head_weights(w1, b1, OUT - C + 32 * h, E1, OUT, C, WIDE, NARROW, L2, L16),)
        first = _weights(w2, back, C, merged + 32 * h, 32, C, WIDE)
        projections = projections + ((first, _weights(w2 + C * C, back, C, merged + 32 * h, 32, C, WIDE) if E2 == 2 else first),)
        routes2 = routes2 + (_router(route2, merged + 32 * h, 32, C, WIDE, L2) if E2 == 2 else (0, 0),)
        if WINDOW > 0:
            bands = bands + ((_band(conv + h * WINDOW, 0, 8, WINDOW, NARROW, L16), _band(conv + h * WINDOW, -8, 16, WINDOW, NARROW, L16)),)
        else:
            bands = bands + (0,)
    shift = _biases(b2, _place(gl.arange(0, C, gl.SliceLayout(1, L16)), C), C, E2, C, NARROW, L16)
    gammas, betas = _norm_parts(gamma, beta, C, L)
    routes1 = _routers(route1, E1, C, WIDE, L2)
    k16 = gl.arange(0, 16, gl.SliceLayout(0, L16))[None, :] - gl.arange(0, 16, gl.SliceLayout(1, L16))[:, None]
    halves = gl.allocate_shared_memory(gl.float16, [16, 16], NARROW, gl.where(k16 == 0, half, 0.0).to(gl.float16))

    pairs = _pairs(x + picture.to(gl.int64) * N * C)
    out += picture.to(gl.int64) * N * C
    r = gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, LP)))
    # Of a warp's first tile the last eight tokens are those before its run; results lie eight tokens behind what is loaded.
    token = (part * WARPS + r // 16 % WARPS) * (steps * 16 * T) + r // (16 * WARPS) * 16 + r % 16 + (8 - 16 * T)
    offsets = _offsets(token, C // 8, LP)
    _wait_for_inputs(PDL)
    for h in gl.static_range(HEADS):
        contexts = contexts + (_context(context + (picture * parts * HEADS + h) * 1024, parts, HEADS, scale, WIDE, L4),)
    fence_async_shared()
    barrier()
    tile = _tile(pairs, offsets, token, N)
    codes, groups = _projected(
        tile, (token >= 0) & (token < N), gammas, betas, routes1, eps, queries, values, X, E1, HEADS, ZERO, SIGNED, C, T, GROUP, WARPS
    )
    q_last, v_last = (), ()
    for h in gl.static_range(HEADS):
        q_last = q_last + (_split_rows(codes[h], 8, T, WARPS)[2 * T - 1],)
        v_last = v_last + ((groups[h][2 * T - 2], groups[h][2 * T - 1]),)
    token += 16 * T
    offsets += 8 * T * C
    places = _offsets(token - 8, C // 4, L)
    tile = _tile(pairs, offsets, token, N)

    for _step in range(steps):
        # Read once more: it is near, and to keep it would take registers.
        residual = _tile(pairs, offsets - 4 * C, token - 8, N)
        codes, groups = _projected(
            tile, (token >= 0) & (token < N), gammas, betas, routes1, eps, queries, values, X, E1, HEADS, ZERO, SIGNED, C, T, GROUP, WARPS
        )
        # Under way while this tile is computed.
        tile = _tile(pairs, offsets + 8 * T * C, token + 16 * T, N)
        lead = gl.full([R, 8], 0.0, gl.float32, MMA)
        heads, last, q_behind = (), (), ()
        for h in gl.static_range(HEADS):
            q, q_end = _later(q_last[h], codes[h], 8, T, WARPS)
            o = _attended(q, v_last[h] + groups[h], contexts[h], bands[h], halves, post, LOCAL, UNIT, WINDOW, T, GROUP, WARPS)
            heads, q_behind, last = heads + (o,), q_behind + (q_end,), last + ((groups[h][2 * T - 2], groups[h][2 * T - 1]),)
            if E2 == 2:
                lead = _lead(_operand(o, 8, T, WARPS), routes2[h], lead, WARPS)
        q_last, v_last = q_behind, last
        done = gl.convert_layout(token - 8, gl.SliceLayout(1, gl.SliceLayout(2, L)), assert_trivial=True)
        mine, other, flags = _shares(lead, done < N, E2, T, WARPS, L)
        LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        y = mma_v2(_operand(flags, 4, T, WARPS), shift.permute((1, 0)).load(LB), gl.full([R, C], 0.0, gl.float32, MMA))
        y = _start(y, C, GROUP, WARPS)
        for h in gl.static_range(HEADS):
            o = heads[h]
            if E2 == 2:
                theirs = _times(o, gl.convert_layout(other, gl.SliceLayout(2, L8), assert_trivial=True)[:, :, None])
                y = _add_product(_operand(theirs, 8, T, WARPS), projections[h][1], y, C, GROUP, WARPS)
                o = _times(o, gl.convert_layout(mine, gl.SliceLayout(2, L8), assert_trivial=True)[:, :, None])
            y = _add_product(_operand(o, 8, T, WARPS), projections[h][0], y, C, GROUP, WARPS)
        y = _as_rows(_end(y, GROUP, WARPS), C // 4, T, WARPS) + gl.convert_layout(_floats(residual, X), L, assert_trivial=True)
        gl.store(out + places, y.to(X), mask=(done < N)[:, None, None] & (places == places))
        token += 16 * T
        offsets += 8 * T * C
        places += 16 * T * C
