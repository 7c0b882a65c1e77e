"""The first kernel: contexts. What it shares with the second one, a tile's norm and router and the weights, is here too."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..conv_mlp.kernels import _wait_for_inputs
from ..conv_mlp.pieces import _times, barrier
from .pieces import (
    _above, _biases, _chunks, _down, _floats, _lead, _normalised, _operand, _pairs, _place, _router, _shares, _transposed_product, _weights, rows_layout,
)  # fmt: skip


@gluon.jit
def _norm_parts(gamma, beta, C: gl.constexpr, L: gl.constexpr):
    """LayerNorm's two vectors, as four lanes have them."""
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lane = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(0, L)))
    own = gl.arange(0, C // 4, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    cs = lane[:, None] * (C // 4) + own[None, :]
    return gl.allocate_shared_memory(gl.float32, [4, C // 4], VECTOR, gl.load(gamma + cs)), gl.allocate_shared_memory(
        gl.float32, [4, C // 4], VECTOR, gl.load(beta + cs)
    )


@gluon.jit
def _head_weights(
    w, b, head_row, E: gl.constexpr, OUT: gl.constexpr, C: gl.constexpr, shared: gl.constexpr, narrow: gl.constexpr, L: gl.constexpr,
    L16: gl.constexpr,
):  # fmt: skip
    """Both experts' weights of 32 rows, in chunks of 32 columns, and their biases."""
    rows = head_row + gl.arange(0, 32, gl.SliceLayout(1, L))
    first, second = (), ()
    for k in gl.static_range(C // 32):
        columns = _place(32 * k + gl.arange(0, 32, gl.SliceLayout(0, L)), C)
        first = first + (_weights(w, rows, 32, columns, 32, C, shared),)
        if E == 2:
            second = second + (_weights(w + OUT * C, rows, 32, columns, 32, C, shared),)
    return first, second, _biases(b, head_row + gl.arange(0, 32, gl.SliceLayout(1, L16)), 32, E, OUT, narrow, L16)


@gluon.jit
def _routers(route, E: gl.constexpr, C: gl.constexpr, shared: gl.constexpr, L: gl.constexpr):
    """A router's parts for each chunk of channels."""
    routes = ()
    if E == 2:
        for k in gl.static_range(C // 32):
            routes = routes + (_router(route, _place(32 * k + gl.arange(0, 32, gl.SliceLayout(0, L)), C), 32, C, shared, L),)
    return routes


@gluon.jit
def _routed(
    tile, inside, gammas, betas, routes, eps, X: gl.constexpr, E: gl.constexpr, C: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """LayerNorm and router of tokens of dtype X: the rows of either expert, in chunks, zero where they are the other's or outside the picture, and flags."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    L: gl.constexpr = rows_layout(C // 4, WARPS, T)
    L8: gl.constexpr = rows_layout(8, WARPS, T)
    a = gl.convert_layout(_floats(tile, X), L, assert_trivial=True)
    chunks = _chunks(_normalised(a, gammas, betas, eps, C, L), C, T, WARPS)
    lead = gl.full([16 * WARPS * T, 8], 0.0, gl.float32, MMA)
    if E == 2:
        for k in gl.static_range(C // 32):
            lead = _lead(_operand(chunks[k], 8, T, WARPS), routes[k], lead, WARPS)
    mine, theirs, flags = _shares(lead, inside, E, T, WARPS, rows_layout(C // 8, WARPS, T))
    mine = gl.convert_layout(mine, gl.SliceLayout(2, L8), assert_trivial=True)
    theirs = gl.convert_layout(theirs, gl.SliceLayout(2, L8), assert_trivial=True)
    own, other = (), ()
    for k in gl.static_range(C // 32):
        own = own + (_times(chunks[k], mine[:, :, None]),)
        if E == 2:
            other = other + (_times(chunks[k], theirs[:, :, None]),)
    return own, other, flags


@gluon.jit
def _tile(pairs, offsets, token, N):
    """Those tokens, zero where there are none."""
    inside = (token >= 0) & (token < N)
    return gl.load(pairs + offsets, mask=inside[:, None, None] & (offsets == offsets), other=0)


@gluon.jit
def _offsets(token, I: gl.constexpr, L: gl.constexpr):  # noqa: E741
    """Where four lanes find their I values of a token, of 4 · I."""
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    own = gl.arange(0, I, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return gl.convert_layout(token, gl.SliceLayout(1, gl.SliceLayout(2, L)), assert_trivial=True)[:, None, None] * (4 * I) + lane * I + own


@gluon.jit(do_not_specialize=["steps", "programs"])
def attn_context_kernel(
    x, gamma, beta, w, b, route, context, N, steps, programs, eps, E: gl.constexpr, HEADS: gl.constexpr, OUT: gl.constexpr, KEYS: gl.constexpr,
    ZERO: gl.constexpr, SIGNED: gl.constexpr, T: gl.constexpr, C: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Σ kᵀv over one of `programs` parts of a picture, steps · 16 · T tokens a warp. Keys are the weights' rows from KEYS on, values the
    last C."""
    L: gl.constexpr = rows_layout(C // 4, WARPS, T)
    LP: gl.constexpr = rows_layout(C // 8, WARPS, T)
    X: gl.constexpr = x.dtype.element_ty
    L2: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [WARPS, 1], [1, 0])
    L16: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    MANY: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    WIDE: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    NARROW: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    R: gl.constexpr = 16 * WARPS * T
    picture, part = gl.program_id(0) // programs, gl.program_id(0) % programs

    keys, values, totals = (), (), ()
    for h in gl.static_range(HEADS):
        keys = keys + (_head_weights(w, b, KEYS + 32 * h, E, OUT, C, WIDE, NARROW, L2, L16),)
        values = values + (_head_weights(w, b, OUT - C + 32 * h, E, OUT, C, WIDE, NARROW, L2, L16),)
        totals = totals + (gl.full([WARPS, 32, 32], 0.0, gl.float32, MANY),)
    gammas, betas = _norm_parts(gamma, beta, C, L)
    routes = _routers(route, E, C, WIDE, L2)

    pairs = _pairs(x + picture.to(gl.int64) * N * C)
    r = gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, LP)))
    token = (part * WARPS + r // 16 % WARPS) * (steps * 16 * T) + r // (16 * WARPS) * 16 + r % 16
    offsets = _offsets(token, C // 8, LP)
    # All weights are in place: no barrier is needed inside the loop.
    barrier()
    _wait_for_inputs(PDL)
    tile = _tile(pairs, offsets, token, N)

    for _step in range(steps):
        own, other, flags = _routed(tile, token < N, gammas, betas, routes, eps, X, E, C, T, WARPS)
        token += 16 * T
        offsets += 8 * T * C
        # Under way while this tile is computed.
        tile = _tile(pairs, offsets, token, N)
        sums = ()
        for h in gl.static_range(HEADS):
            k = _transposed_product(flags, own, other, keys[h][2], keys[h][0], keys[h][1], E, C, T, WARPS)
            v = _transposed_product(flags, own, other, values[h][2], values[h][0], values[h][1], E, C, T, WARPS)
            level = gl.full([R], 0.0, gl.float16, gl.SliceLayout(0, MMA)) if ZERO else _down(gl.sum(k.to(gl.float32), 0) / 32)
            code = _above(k, level[None, :])
            if SIGNED:
                code = code + code - gl.full([32, R], 1.0, gl.float16, MMA)
            code = gl.reshape(gl.permute(gl.reshape(code, [32, 2 * T, WARPS, 8]), [2, 0, 1, 3]), [WARPS, 32, 16 * T])
            v = gl.reshape(gl.permute(gl.reshape(v, [32, 2 * T, WARPS, 8]), [2, 1, 3, 0]), [WARPS, 16 * T, 32])
            code = gl.convert_layout(code, gl.DotOperandLayout(0, MANY, 2), assert_trivial=True)
            v = gl.convert_layout(v, gl.DotOperandLayout(1, MANY, 2), assert_trivial=True)
            sums = sums + (mma_v2(code, v, totals[h]),)
        totals = sums

    LS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    i = gl.arange(0, 32, gl.SliceLayout(1, LS))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, LS))[None, :]
    shared = gl.allocate_shared_memory(gl.float32, [32 * WARPS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for h in gl.static_range(HEADS):
        barrier()
        shared.store(gl.reshape(totals[h], [32 * WARPS, 32]))
        barrier()
        total = shared.slice(0, 32).load(LS)
        for warp in gl.static_range(1, WARPS):
            total += shared.slice(32 * warp, 32).load(LS)
        gl.store(context + ((gl.program_id(0) * HEADS + h) * 1024 + i), total, mask=i >= 0)
