"""The kernel: what a program holds, and its walk. Its parts, and how they lie in registers, are in `pieces`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .pieces import (
    _convolve, _finish, _from_lane, _hidden, _joined, _lead, _new_sums, _operands, _rows, _spots, _start_fc2, barrier, column_layout, out_layout,
    tap_layout,
)  # fmt: skip


@gluon.jit
def _wait_for_inputs(PDL: gl.constexpr):
    """With programmatic dependent launch: let the next kernel start its launch, then wait until this one's inputs are written."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _matrix(pointer, rows, R: gl.constexpr, K: gl.constexpr, shared: gl.constexpr, L: gl.constexpr):
    """Rows of a row-major (·, K) matrix, in shared memory."""
    ks = gl.arange(0, K, gl.SliceLayout(0, L))
    return gl.allocate_shared_memory(gl.float16, [R, K], shared, gl.load(pointer + rows[:, None] * K + ks[None, :]))


@gluon.jit
def _row_buffers(E1: gl.constexpr, C: gl.constexpr, shared: gl.constexpr, narrow: gl.constexpr):
    """For each of two rows the left operands of fc1, of either expert, and the rows' flags."""
    own1, own2, flags = (), (), ()
    for row in gl.static_range(2):
        own1 = own1 + (gl.allocate_shared_memory(gl.float16, [64, C], shared),)
        own2 = own2 + (gl.allocate_shared_memory(gl.float16, [64, C], shared) if E1 == 2 else own1[row],)
        flags = flags + (gl.allocate_shared_memory(gl.float16, [64, 16], narrow),)
    return own1, own2, flags


@gluon.jit
def _biases(b1, fs, E1: gl.constexpr, F: gl.constexpr, N: gl.constexpr, narrow: gl.constexpr, L: gl.constexpr):
    """Biases are a product too: one with each row's flags, of their upper halves and their lower ones. Of the N channels `fs`."""
    kinds = gl.arange(0, 16, gl.SliceLayout(0, L))
    bias = gl.load(b1 + kinds[None, :] % 8 * F + fs[:, None], mask=(kinds[None, :] % 8 < E1) & (fs[:, None] >= 0), other=0.0)
    upper = bias.to(gl.float16)
    lower = (bias - upper.to(gl.float32)).to(gl.float16)
    return gl.allocate_shared_memory(gl.float16, [N, 16], narrow, gl.where((kinds < 8)[None, :], upper, lower))


@gluon.jit
def _filters(conv, conv_bias, channels, F: gl.constexpr, N: gl.constexpr, shared: gl.constexpr):
    """Nine filters of those N channels and the convolution's bias, all halved for `_gelu`."""
    taps = ()
    for k in gl.static_range(9):
        taps = taps + (gl.allocate_shared_memory(gl.float16, [N], shared, (gl.load(conv + k * F + channels).to(gl.float32) * 0.5).to(gl.float16)),)
    return taps, gl.allocate_shared_memory(gl.float16, [N], shared, (gl.load(conv_bias + channels) * 0.5).to(gl.float16))


@gluon.jit
def _norm_and_route(gamma, beta, route1, ks, E1: gl.constexpr, C: gl.constexpr):
    """LayerNorm's two vectors, and the router's difference."""
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    gammas = gl.allocate_shared_memory(gl.float32, [C], VECTOR, gl.load(gamma + ks))
    betas = gl.allocate_shared_memory(gl.float32, [C], VECTOR, gl.load(beta + ks))
    route = betas
    if E1 == 2:
        parts = gl.load(route1 + ks).to(gl.float32) + gl.load(route1 + C + ks).to(gl.float32) + gl.load(route1 + 2 * C + ks).to(gl.float32)
        route = gl.allocate_shared_memory(gl.float32, [C], VECTOR, parts)
    return gammas, betas, route


@gluon.jit(do_not_specialize=["bands", "pictures"])
def conv_mlp_kernel(
    x, gamma, beta, w1, b1, route1, conv, conv_bias, w2, b2, route2, out, H, W, bands, pictures, eps,
    E1: gl.constexpr, E2: gl.constexpr, COLUMNS: gl.constexpr, LANES: gl.constexpr, ROWS: gl.constexpr, C: gl.constexpr, F: gl.constexpr,
    LATE: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of 8 / LANES pictures. LATE: fc2 runs beside the convolution, and is waited for behind it."""
    LX: gl.constexpr = gl.BlockedLayout([1, C // 4], [8, 4], [WARPS, 1], [1, 0])
    L64: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    L16: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    LH: gl.constexpr = column_layout(F, WARPS)
    LO: gl.constexpr = out_layout(C, WARPS)
    NARROW: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    NARROWER: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    TAPS: gl.constexpr = tap_layout(F, WARPS)
    picture, top = gl.program_id(0) // bands * (8 // LANES), gl.program_id(0) % bands * ROWS

    # Weights do not come from the kernel before this one.
    act = gl.allocate_shared_memory(gl.float16, [128, F], WIDE)
    own1, own2, flags = _row_buffers(E1, C, NARROW, NARROWER)
    n = gl.arange(0, C * E2, gl.SliceLayout(1, L64))
    # Columns of fc2 in the order in which a thread's are adjacent channels.
    w2s = _matrix(w2, n // C * C + n // 2 % 4 * (C // 4) + n // 8 % (C // 8) * 2 + n % 2, C * E2, F, WIDE, L64)
    route2s = _matrix(route2, gl.arange(0, 8, gl.SliceLayout(1, L64)), 8, F, WIDE, L64) if E2 == 2 else w2s
    w1s = _matrix(w1, gl.arange(0, F, gl.SliceLayout(1, LX)), F, C, NARROW, LX)
    w1bs = _matrix(w1 + F * C, gl.arange(0, F, gl.SliceLayout(1, LX)), F, C, NARROW, LX) if E1 == 2 else w1s
    b1s = _biases(b1, gl.arange(0, F, gl.SliceLayout(1, L16)), E1, F, F, NARROWER, L16)
    taps, shift = _filters(conv, conv_bias, gl.arange(0, F, gl.SliceLayout(0, LH)), F, F, TAPS)
    ks = gl.arange(0, C, gl.SliceLayout(0, LX))
    gammas, betas, route = _norm_and_route(gamma, beta, route1, ks, E1, C)
    fence_async_shared()

    base = picture.to(gl.int64) * H * W * C
    x += base
    out += base
    spots = _spots(gl.arange(0, 64, gl.SliceLayout(1, LX)), pictures - picture, H, W, COLUMNS, LANES)
    n = gl.arange(0, 128, gl.SliceLayout(1, LO))
    spots_out = _spots(n % 64, pictures - picture, H, W, COLUMNS, LANES)
    seen, seen_out = spots >= 0, spots_out >= 0
    # The first of the rows that a step loads lies one above the strip; fc2 finishes two that lie three above those.
    y = top - 1
    spots_out += (n // 64 - 3) * W
    above, here = (), ()
    for _ in gl.static_range(COLUMNS):
        above = above + (gl.full([8, F], 0.0, gl.float16, LH),)
        here = here + (gl.full([8, F], 0.0, gl.float16, LH),)
    _wait_for_inputs(PDL)
    tile0, tile1 = _rows(x, spots + y * W, ks, seen & (y >= 0), C), _rows(x, spots + (y + 1) * W, ks, seen & (y + 1 < H), C)

    for step in range(ROWS // 2 + 1):
        _operands(tile0, seen & (y >= 0) & (y < H), own1[0], own2[0], flags[0], gammas, betas, route, eps, E1, C, LX)
        _operands(tile1, seen & (y + 1 < H), own1[1], own2[1], flags[1], gammas, betas, route, eps, E1, C, LX)
        h = _hidden(own1[0], own2[0], flags[0], w1s, w1bs, b1s, E1, COLUMNS, F, MMA, LH)
        acc = _start_fc2(act, w2s, C * E2, WARPS)
        lead = _lead(act, route2s, F, WARPS) if E2 == 2 else 0
        # The first step of a strip has no finished rows, and the one behind it only those above the strip.
        ready = seen_out & (y - 3 + n // 64 < H) & (step >= 2)
        if not LATE:
            acc = warpgroup_mma_wait(0, (acc,))
            _finish(acc, lead, b2, x, out, spots_out + y * W, ready, C, E2, LO)
        # A hidden row adds to three rows of outputs: the one above it, which it finishes, its own, and a new one.
        before, behind = _from_lane(h[COLUMNS - 1], "up", LANES), _from_lane(h[0], "down", LANES)
        done = _convolve(above, h, before, behind, taps, 2, True, COLUMNS, LH)
        if LATE:
            acc = warpgroup_mma_wait(0, (acc,))
            _finish(acc, lead, b2, x, out, spots_out + y * W, ready, C, E2, LO)
        # Every warp's products have read the rows that are now written over.
        barrier()
        act.slice(0, 64).store(_joined(done, COLUMNS, F, MMA, LH))
        above = _convolve(here, h, before, behind, taps, 1, False, COLUMNS, LH)
        here = _convolve(_new_sums(shift, COLUMNS, LH), h, before, behind, taps, 0, False, COLUMNS, LH)
        y += 2
        # Under way while the second row is computed.
        tile0, tile1 = _rows(x, spots + y * W, ks, seen & (y < H), C), _rows(x, spots + (y + 1) * W, ks, seen & (y + 1 < H), C)
        h = _hidden(own1[1], own2[1], flags[1], w1s, w1bs, b1s, E1, COLUMNS, F, MMA, LH)
        before, behind = _from_lane(h[COLUMNS - 1], "up", LANES), _from_lane(h[0], "down", LANES)
        done = _convolve(above, h, before, behind, taps, 2, True, COLUMNS, LH)
        act.slice(64, 64).store(_joined(done, COLUMNS, F, MMA, LH))
        above = _convolve(here, h, before, behind, taps, 1, False, COLUMNS, LH)
        here = _convolve(_new_sums(shift, COLUMNS, LH), h, before, behind, taps, 0, False, COLUMNS, LH)
        fence_async_shared()
    acc = warpgroup_mma_wait(0, (_start_fc2(act, w2s, C * E2, WARPS),))
    lead = _lead(act, route2s, F, WARPS) if E2 == 2 else 0
    _finish(acc, lead, b2, x, out, spots_out + y * W, seen_out & (y - 3 + n // 64 < H), C, E2, LO)
