"""PVTv2's whole MLP as a walk down strips of pictures: no value of the hidden tensor leaves the multiprocessor.

Written in Gluon, Triton's language with explicit layouts, because the convolution needs them. A program's 64 rows of products are the columns
of one row of a picture (or of rows of several narrow ones), ordered so that the eight lanes that share a channel hold COLUMNS adjacent ones
each, all in registers: m = 8 · column + lane. A neighbour is another register, but for one column in COLUMNS on either side, which a shuffle
brings. Warps divide the hidden channels; only fc2 needs all of them, from shared memory.

A step takes two rows through LayerNorm, fc1 and the convolution, and the two rows that the step before finished through fc2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ..conv_gelu.triton import twice
from ..tiles import GELU_A, GELU_B, GELU_C, GELU_LIMIT

# conv_gelu's, of x / 2: the halves are in the filters, which saves a product and rounds alike.
HALF_GELU = gl.constexpr(
    "{ .reg .b32 s, t, c; mul.rn.f16x2 s, $1, $1; "
    f"mov.b32 c, {twice(GELU_LIMIT.value / 4)}; min.f16x2 s, s, c; "
    f"mov.b32 c, {twice(GELU_C.value * 32)}; mov.b32 t, {twice(GELU_B.value * 8)}; fma.rn.f16x2 t, s, c, t; "
    f"mov.b32 c, {twice(GELU_A.value * 2)}; fma.rn.f16x2 t, s, t, c; mul.rn.f16x2 t, t, $1; tanh.approx.f16x2 t, t; "
    "fma.rn.f16x2 $0, $1, t, $1; }"
)


# Its name changed in Triton 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _gelu(half):
    """GELU(2 · half), two at a time."""
    return gl.inline_asm_elementwise(HALF_GELU, "=r,r", [half], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _add(total, left, middle, right, f0, f1, f2):
    """total + left · f0 + middle · f1 + right · f2, rounded after each, two channels at a time."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; fma.rn.f16x2 t, $2, $5, $1; fma.rn.f16x2 t, $3, $6, t; fma.rn.f16x2 $0, $4, $7, t; }",
        "=r,r,r,r,r,r,r,r", [total, left, middle, right, f0, f1, f2], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _times(a, b):
    """a · b, two at a time."""
    return gl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.constexpr_function
def _shuffle(way, lanes):
    edge = (32 - 4 * lanes) << 8 | (31 if way == "down" else 0)
    return f"{{ .reg .pred p; .reg .b32 t; shfl.sync.{way}.b32 t|p, $1, 4, {edge}, 0xffffffff; selp.b32 $0, t, 0, p; }}"


@gluon.jit
def _from_lane(value, WAY: gl.constexpr, LANES: gl.constexpr):
    """What the lane before (WAY "up") or behind ("down") holds, of the LANES that share a row of a picture; zero beyond them."""
    return gl.inline_asm_elementwise(_shuffle(WAY, LANES), "=r,r", [value], dtype=gl.float16, is_pure=True, pack=2)


@gluon.constexpr_function
def _doubling(first, last, at, rank):
    """Bases first, 2 · first … below last, along one of the dimensions."""
    bases = []
    while first < last:
        bases.append([first if dim == at else 0 for dim in range(rank)])
        first *= 2
    return bases


@gluon.constexpr_function
def column_layout(F, WARPS):
    """(8 lanes, F channels): half of a product's 16 rows."""
    return gl.DistributedLinearLayout(
        [[0, 1], *_doubling(8 * WARPS, F, 1, 2)], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], _doubling(8, 8 * WARPS, 1, 2), [], [8, F]
    )


@gluon.constexpr_function
def adjacent_layout(WARPS):
    """(8 lanes, 32 channels a warp), eight adjacent ones a thread."""
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4]], lanes, _doubling(32, 32 * WARPS, 1, 2), [], [8, 32 * WARPS])


@gluon.constexpr_function
def tap_layout(F, WARPS):
    """F channels in shared memory, those of one thread adjacent."""
    return gl.SharedLinearLayout([[1], *_doubling(8 * WARPS, F, 0, 1), [2], [4], *_doubling(8, 8 * WARPS, 0, 1)])


@gluon.constexpr_function
def out_layout(C, WARPS):
    """(128, C) results of fc2: a thread has C / 4 adjacent channels of two rows."""
    own = _doubling(1, C // 4, 1, 2)
    return gl.DistributedLinearLayout(
        [*own, [8, 0]], [[0, C // 4], [0, C // 2], [1, 0], [2, 0], [4, 0]], _doubling(16, 16 * WARPS, 0, 2), [], [128, C]
    )


@gluon.jit
def _spots(m, pictures, H, W, COLUMNS: gl.constexpr, LANES: gl.constexpr):
    """Where row m of a tile finds its token in the first row of the first of so many pictures; -1 for none."""
    picture, column = m % 8 // LANES, m % LANES * COLUMNS + m // 8
    return gl.where((m // 8 < COLUMNS) & (column < W) & (picture < pictures), picture * H * W + column, -1)


@gluon.jit
def _rows(x, spots, ks, inside, C: gl.constexpr):
    """The tokens at those spots, zero where there are none, or they are not `inside`."""
    return gl.load(x + (spots[:, None] * C + ks[None, :]), mask=inside[:, None] & (ks[None, :] >= 0), other=0.0)


@gluon.jit
def _operands(tile, inside, own1, own2, flags, gamma, beta, route, eps, E1: gl.constexpr, C: gl.constexpr, LX: gl.constexpr):
    """LayerNorm and router of one row: to shared memory as fc1's left operands, each expert's rows with zeros for the other's, and which
    bias each row gets."""
    a = tile.to(gl.float32)
    a = a - (gl.sum(a, 1) / C)[:, None]
    a = a * gl.rsqrt(gl.sum(a * a, 1) / C + eps)[:, None]
    a = (a * gamma.load(gl.SliceLayout(0, LX))[None, :] + beta.load(gl.SliceLayout(0, LX))[None, :]).to(gl.float16)
    kinds = gl.arange(0, 16, gl.SliceLayout(0, LX)) % 8
    one = gl.full([64], 1.0, gl.float16, gl.SliceLayout(1, LX))
    zero = gl.full([64], 0.0, gl.float16, gl.SliceLayout(1, LX))
    none = gl.full([64, 16], 0.0, gl.float16, LX)
    if E1 == 2:
        second = gl.sum(a.to(gl.float32) * route.load(gl.SliceLayout(0, LX))[None, :], 1) > 0
        mine = gl.where(inside & (second == 0), one, zero)[:, None]
        other = gl.where(inside & second, one, zero)[:, None]
        own2.store(_times(a, other))
        none = gl.where((kinds == 1)[None, :], other, none)
    else:
        mine = gl.where(inside, one, zero)[:, None]
    own1.store(_times(a, mine))
    flags.store(gl.where((kinds == 0)[None, :], mine, none))


@gluon.jit
def _hidden(
    own1, own2, flags, w1, w1b, b1, E1: gl.constexpr, COLUMNS: gl.constexpr, F: gl.constexpr, MMA: gl.constexpr, LH: gl.constexpr
):
    """fc1 of one row: a tensor (8 lanes, F) for each of the COLUMNS."""
    LA: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    bias, first = b1.permute((1, 0)).load(LB), w1.permute((1, 0)).load(LB)
    if E1 == 2:
        second = w1b.permute((1, 0)).load(LB)
    h = ()
    for t in gl.static_range((COLUMNS + 1) // 2):
        acc = mma_v2(flags.slice(16 * t, 16).load(LA), bias, gl.full([16, F], 0.0, gl.float32, MMA))
        acc = mma_v2(own1.slice(16 * t, 16).load(LA), first, acc)
        if E1 == 2:
            acc = mma_v2(own2.slice(16 * t, 16).load(LA), second, acc)
        low, high = gl.split(gl.permute(gl.reshape(acc.to(gl.float16), [2, 8, F]), [1, 2, 0]))
        h = h + (gl.convert_layout(low, LH, assert_trivial=True),)
        if 2 * t + 1 < COLUMNS:
            h = h + (gl.convert_layout(high, LH, assert_trivial=True),)
    return h


@gluon.jit
def _convolve(
    totals, h, before, behind, taps, K: gl.constexpr, GELU: gl.constexpr, COLUMNS: gl.constexpr, LH: gl.constexpr,
):  # fmt: skip
    """Sums of a row of outputs plus row K of the filters on a hidden row; with GELU they are finished, and go through it."""
    L: gl.constexpr = gl.SliceLayout(0, LH)
    f0, f1, f2 = taps[3 * K].load(L)[None, :], taps[3 * K + 1].load(L)[None, :], taps[3 * K + 2].load(L)[None, :]
    sums = ()
    for c in gl.static_range(COLUMNS):
        left = before if c == 0 else h[c - 1]
        right = behind if c == COLUMNS - 1 else h[c + 1]
        total = _add(totals[c], left, h[c], right, f0, f1, f2)
        sums = sums + (_gelu(total) if GELU else total,)
    return sums


@gluon.jit
def _new_sums(shift, COLUMNS: gl.constexpr, LH: gl.constexpr):
    start = shift.load(gl.SliceLayout(0, LH))[None, :]
    sums = ()
    for _ in gl.static_range(COLUMNS):
        sums = sums + (start,)
    return sums


@gluon.jit
def _joined(columns, COLUMNS: gl.constexpr, F: gl.constexpr, MMA: gl.constexpr, LH: gl.constexpr):
    """Columns as one tile (64, F), m = 8 · column + lane."""
    for _ in gl.static_range(COLUMNS, 8):
        columns = columns + (gl.full([8, F], 0.0, gl.float16, LH),)
    low = gl.join(gl.join(columns[0], columns[1]), gl.join(columns[2], columns[3]))
    high = gl.join(gl.join(columns[4], columns[5]), gl.join(columns[6], columns[7]))
    tile = gl.reshape(gl.permute(gl.join(low, high), [4, 3, 2, 0, 1]), [64, F])
    return gl.convert_layout(tile, MMA, assert_trivial=True)


@gluon.jit
def _start_fc2(act, w2, N: gl.constexpr, WARPS: gl.constexpr):
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    return warpgroup_mma(act, w2.permute((1, 0)), gl.full([128, N], 0.0, gl.float32, L), use_acc=False, is_async=True)


@gluon.jit
def _lead(act, route, F: gl.constexpr, WARPS: gl.constexpr):
    """How far the second expert's logit leads, of every row."""
    L: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    LA: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, L, 2)
    none = gl.full([128, 8], 0.0, gl.float32, L)
    lead = none
    # Four sums: one would be a chain of products that wait for each other.
    for k in gl.static_range(0, F, F // 4):
        lead = lead + mma_v2(act.slice(k, F // 4, 1).load(LA), route.slice(k, F // 4, 1).permute((1, 0)).load(LB), none)
    return gl.sum(lead, 1)


@gluon.jit
def _finish(acc, lead, b2, x, out, spots, seen, C: gl.constexpr, E2: gl.constexpr, LO: gl.constexpr):
    """fc2's sums, each row's expert of them, plus bias and residual, stored."""
    cs = gl.arange(0, C, gl.SliceLayout(0, LO))
    y = gl.permute(gl.reshape(acc, [128, E2, C // 8, 4, 2]), [0, 3, 2, 4, 1])
    if E2 == 2:
        y, y2 = gl.split(y)
        y2 = gl.convert_layout(gl.reshape(y2, [128, C]), LO, assert_trivial=True) + gl.load(b2 + C + cs)[None, :]
    y = gl.convert_layout(gl.reshape(y, [128, C]), LO, assert_trivial=True) + gl.load(b2 + cs)[None, :]
    if E2 == 2:
        second = gl.convert_layout(lead, gl.SliceLayout(1, LO), assert_trivial=True) > 0
        y = gl.where(second[:, None], y2, y)
    where = spots[:, None] * C + cs[None, :]
    mask = seen[:, None] & (cs[None, :] >= 0)
    y += gl.load(x + where, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + where, y.to(out.dtype.element_ty), mask=mask)
