"""The first two thirds of the MLP, for more channels than the whole fits in a multiprocessor: LayerNorm, fc1, convolution and GELU. A program
has 256 of the hidden channels, in the order in which those of a thread are adjacent, and writes them once."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .kernels import _biases, _filters, _matrix, _norm_and_route, _row_buffers, _wait_for_inputs
from .pieces import _convolve, _from_lane, _hidden, _new_sums, _operands, _rows, _spots, adjacent_layout, column_layout, tap_layout


@gluon.jit
def _order(n, WARPS: gl.constexpr):
    """The channel, of a program's 32 · WARPS, that a product's column n computes."""
    return n // 8 % WARPS * 32 + n // 2 % 4 * 8 + n // (8 * WARPS) * 2 + n % 2


@gluon.jit
def _write(out, columns, spots, spot, row, W, seen, COLUMNS: gl.constexpr, F: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, LS: gl.constexpr):
    """Finished columns, to their tokens."""
    ns = gl.arange(0, N, gl.SliceLayout(0, LS))
    for c in gl.static_range(COLUMNS):
        values = gl.permute(gl.reshape(columns[c], [8, 4, WARPS, 4, 2]), [0, 2, 3, 1, 4])
        values = gl.convert_layout(gl.reshape(values, [8, N]), LS, assert_trivial=True)
        mask = (seen & (spot + c < W))[:, None] & (ns[None, :] >= 0)
        gl.store(out + ((spots + (row * W + c))[:, None] * F + ns[None, :]), values, mask=mask)


@gluon.jit(do_not_specialize=["bands", "pictures"])
def conv_hidden_kernel(
    x, gamma, beta, w1, b1, route1, conv, conv_bias, out, H, W, bands, pictures, eps, E1: gl.constexpr, COLUMNS: gl.constexpr,
    LANES: gl.constexpr, ROWS: gl.constexpr, C: gl.constexpr, F: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of 8 / LANES pictures, 32 · WARPS hidden channels of them."""
    N: gl.constexpr = 32 * WARPS
    BLOCKS: gl.constexpr = F // N
    LX: gl.constexpr = gl.BlockedLayout([1, C // 4], [8, 4], [WARPS, 1], [1, 0])
    L16: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    LH: gl.constexpr = column_layout(N, WARPS)
    LS: gl.constexpr = adjacent_layout(WARPS)
    NARROW: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    NARROWER: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    TAPS: gl.constexpr = tap_layout(N, WARPS)
    block, place = gl.program_id(0) % BLOCKS * N, gl.program_id(0) // BLOCKS
    picture, top = place // bands * (8 // LANES), place % bands * ROWS

    own1, own2, flags = _row_buffers(E1, C, NARROW, NARROWER)
    ns = block + _order(gl.arange(0, N, gl.SliceLayout(1, LX)), WARPS)
    w1s = _matrix(w1, ns, N, C, NARROW, LX)
    w1bs = _matrix(w1 + F * C, ns, N, C, NARROW, LX) if E1 == 2 else w1s
    b1s = _biases(b1, block + _order(gl.arange(0, N, gl.SliceLayout(1, L16)), WARPS), E1, F, N, NARROWER, L16)
    taps, shift = _filters(conv, conv_bias, block + _order(gl.arange(0, N, gl.SliceLayout(0, LH)), WARPS), F, N, TAPS)
    ks = gl.arange(0, C, gl.SliceLayout(0, LX))
    gammas, betas, route = _norm_and_route(gamma, beta, route1, ks, E1, C)

    x += picture.to(gl.int64) * H * W * C
    out += picture.to(gl.int64) * H * W * F + block
    spots = _spots(gl.arange(0, 64, gl.SliceLayout(1, LX)), pictures - picture, H, W, COLUMNS, LANES)
    seen, y = spots >= 0, top - 1
    lane = gl.arange(0, 8, gl.SliceLayout(1, LS))
    spot, wanted = lane % LANES * COLUMNS, lane // LANES < pictures - picture
    spots_out = lane // LANES * H * W + spot
    above, here = (), ()
    for _ in gl.static_range(COLUMNS):
        above = above + (gl.full([8, N], 0.0, gl.float16, LH),)
        here = here + (gl.full([8, N], 0.0, gl.float16, LH),)
    _wait_for_inputs(PDL)
    tile0, tile1 = _rows(x, spots + y * W, ks, seen & (y >= 0), C), _rows(x, spots + (y + 1) * W, ks, seen & (y + 1 < H), C)

    for step in range(ROWS // 2 + 1):
        _operands(tile0, seen & (y >= 0) & (y < H), own1[0], own2[0], flags[0], gammas, betas, route, eps, E1, C, LX)
        _operands(tile1, seen & (y + 1 < H), own1[1], own2[1], flags[1], gammas, betas, route, eps, E1, C, LX)
        y += 2
        for i in gl.static_range(2):
            h = _hidden(own1[i], own2[i], flags[i], w1s, w1bs, b1s, E1, COLUMNS, N, MMA, LH)
            before, behind = _from_lane(h[COLUMNS - 1], "up", LANES), _from_lane(h[0], "down", LANES)
            done = _convolve(above, h, before, behind, taps, 2, True, COLUMNS, LH)
            # The first step of a strip finishes rows above it.
            _write(out, done, spots_out, spot, y - 3 + i, W, wanted & (y - 3 + i < H) & (step >= 1), COLUMNS, F, N, WARPS, LS)
            above = _convolve(here, h, before, behind, taps, 1, False, COLUMNS, LH)
            here = _convolve(_new_sums(shift, COLUMNS, LH), h, before, behind, taps, 0, False, COLUMNS, LH)
            if i == 0:
                # Under way while the second row is computed.
                tile0, tile1 = _rows(x, spots + y * W, ks, seen & (y < H), C), _rows(x, spots + (y + 1) * W, ks, seen & (y + 1 < H), C)
