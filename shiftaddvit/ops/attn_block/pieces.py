"""Linear attention of narrow pictures without a tensor in memory: how values lie in registers, and the steps that both kernels share.

A warp walks over a run of adjacent tokens of one picture, 16 · T at a time, and needs no other warp. A thread has C / 4 adjacent channels of
every eighth token, as it loads them. That is the left operand of a matrix product but for the order of the channels, which the weights follow
(`_place`), and the same registers are the right operand of the transposed product. So queries come out as (tokens, channels), for sums along
channels, keys and values as (channels, tokens), for sums along tokens: Σ kᵀv, and the token convolution, a product with a band. No value
changes threads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..conv_mlp.pieces import _doubling


@gluon.constexpr_function
def rows_layout(I, WARPS, T):  # noqa: E741
    """(16 · T · WARPS rows, 4 lanes, I values): rows of a matrix product's tile, T tiles a warp."""
    own = [*_doubling(1, I, 2, 3), [8, 0, 0], *_doubling(16 * WARPS, 16 * WARPS * T, 0, 3)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(own, lanes, _doubling(16, 16 * WARPS, 0, 3), [], [16 * WARPS * T, 4, I])


@gluon.jit
def _above(values, level):
    """1 where a value is above its level, else 0, two at a time."""
    return gl.inline_asm_elementwise("set.gt.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [values, level], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _down(value):
    """The largest float16 that is not above a float32: float16 values are above the one where they are above the other."""
    return gl.inline_asm_elementwise("cvt.rm.f16.f32 $0, $1;", "=h,f", [value], dtype=gl.float16, is_pure=True, pack=1)


@gluon.jit
def _pairs(x):
    """Tokens as pairs of channels: of single ones a loop would keep each in a register of its own."""
    return x.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def _floats(pairs, T: gl.constexpr):
    """Rows of pairs of channels of dtype T as rows of channels in float32."""
    if T == gl.bfloat16:
        low, high = (pairs << 16).to(gl.float32, bitcast=True), (pairs & -65536).to(gl.float32, bitcast=True)
    else:
        low = pairs.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (pairs >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return gl.reshape(gl.join(low, high), [pairs.shape[0], 4, 2 * pairs.shape[2]])


@gluon.jit
def _place(n, C: gl.constexpr):
    """The channel at place n of a product's rows or columns, of C."""
    return n // 2 % 4 * (C // 4) + n // 8 * 2 + n % 2


@gluon.jit
def _weights(pointer, rows, R: gl.constexpr, columns, K: gl.constexpr, stride: gl.constexpr, shared: gl.constexpr):
    """Those rows and columns of a row-major matrix, in shared memory as (R, K)."""
    return gl.allocate_shared_memory(gl.float16, [R, K], shared, gl.load(pointer + rows[:, None] * stride + columns[None, :]).to(gl.float16))


@gluon.jit
def _biases(pointer, rows, R: gl.constexpr, E: gl.constexpr, stride: gl.constexpr, shared: gl.constexpr, L: gl.constexpr):
    """Biases are a product with each token's flags: of their upper halves and their lower ones."""
    kinds = gl.arange(0, 16, gl.SliceLayout(0, L))
    bias = gl.load(pointer + kinds[None, :] % 8 * stride + rows[:, None], mask=(kinds[None, :] % 8 < E) & (rows[:, None] >= 0), other=0.0)
    upper = bias.to(gl.float16)
    lower = (bias - upper.to(gl.float32)).to(gl.float16)
    return gl.allocate_shared_memory(gl.float16, [R, 16], shared, gl.where((kinds < 8)[None, :], upper, lower))


@gluon.jit
def _router(pointer, columns, K: gl.constexpr, stride: gl.constexpr, shared: gl.constexpr, L: gl.constexpr):
    """A router's three parts as two right operands of eight columns: a thread's two columns of the sum of both products add up to the lead."""
    n = gl.arange(0, 8, gl.SliceLayout(1, L)) % 2
    return _weights(pointer, n, 8, columns, K, stride, shared), _weights(pointer, n + 2, 8, columns, K, stride, shared)


@gluon.jit
def _operand(rows, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """Rows as the left operand (tokens, 4 · I)."""
    L: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), 2)
    R: gl.constexpr = 16 * WARPS * T
    a = gl.permute(gl.reshape(rows, [R, 4, I // 2, 2]), [0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(a, [R, 4 * I]), L, assert_trivial=True)


@gluon.jit
def _transposed(rows, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """Rows as the right operand (4 · I, tokens) of the transposed product: each warp's first eight tokens, each one's next eight, …"""
    L: gl.constexpr = gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8]), 2)
    b = gl.permute(gl.reshape(rows, [T, WARPS, 2, 8, 4, I // 2, 2]), [5, 4, 6, 0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(b, [4 * I, 16 * WARPS * T]), L, assert_trivial=True)


@gluon.jit
def _as_rows(acc, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """Sums of a product (tokens, 4 · I) as rows."""
    R: gl.constexpr = 16 * WARPS * T
    rows = gl.permute(gl.reshape(acc, [R, I // 2, 4, 2]), [0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(rows, [R, 4, I]), rows_layout(I, WARPS, T), assert_trivial=True)


@gluon.jit
def _start(acc, N: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """Sums (tokens, N) to which products are added: by each warp, which loads the weights into registers, or by the GROUP of four, which reads
    them where they are, until `_end`."""
    if GROUP:
        acc = gl.convert_layout(acc, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16]), assert_trivial=True)
    return acc


@gluon.jit
def _add_product(left, weights, acc, N: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """acc + left · weightsᵀ."""
    if GROUP:
        L: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16]), 2)
        acc = warpgroup_mma(gl.convert_layout(left, L, assert_trivial=True), weights.permute((1, 0)), acc, is_async=True)
    else:
        LB: gl.constexpr = gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), 2)
        acc = mma_v2(left, weights.permute((1, 0)).load(LB), acc)
    return acc


@gluon.jit
def _end(acc, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """The finished sums."""
    if GROUP:
        acc = warpgroup_mma_wait(0, (acc,))
        acc = gl.convert_layout(acc, gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), assert_trivial=True)
    return acc


@gluon.jit
def _product(flags, own, other, bias, first, second, E: gl.constexpr, K: gl.constexpr, T: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """Each token's bias plus its expert's product, of 32 channels: chunks of K channels times rows of weights."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    L: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    acc = mma_v2(_operand(flags, 4, T, WARPS), bias.permute((1, 0)).load(L), gl.full([16 * WARPS * T, 32], 0.0, gl.float32, MMA))
    acc = _start(acc, 32, GROUP, WARPS)
    for k in gl.static_range(K // 32):
        acc = _add_product(_operand(own[k], 8, T, WARPS), first[k], acc, 32, GROUP, WARPS)
        if E == 2:
            acc = _add_product(_operand(other[k], 8, T, WARPS), second[k], acc, 32, GROUP, WARPS)
    return _end(acc, GROUP, WARPS)


@gluon.jit
def _transposed_product(flags, own, other, bias, first, second, E: gl.constexpr, K: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):
    """The same, transposed: (channels, tokens) in float16."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    L: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    acc = mma_v2(bias.load(L), _transposed(flags, 4, T, WARPS), gl.full([32, 16 * WARPS * T], 0.0, gl.float32, MMA))
    for k in gl.static_range(K // 32):
        acc = mma_v2(first[k].load(L), _transposed(own[k], 8, T, WARPS), acc)
        if E == 2:
            acc = mma_v2(second[k].load(L), _transposed(other[k], 8, T, WARPS), acc)
    return acc.to(gl.float16)


@gluon.jit
def _column(acc, WARPS: gl.constexpr, T: gl.constexpr):
    """Eight columns of a product as the two that each of four lanes has."""
    return gl.split(gl.reshape(acc, [16 * WARPS * T, 4, 2]))


@gluon.jit
def _lead(a, route, lead, WARPS: gl.constexpr):
    """lead + what 32 channels add to how far the second expert's logit leads, in two columns."""
    L: gl.constexpr = gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), 2)
    lead = mma_v2(a, route[0].permute((1, 0)).load(L), lead)
    return mma_v2(a, route[1].permute((1, 0)).load(L), lead)


@gluon.jit
def _shares(lead, inside, E: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr, L: gl.constexpr):
    """(tokens, 4): 1 for the tokens of the first expert, and of the second, and the flags that choose a token's bias, as rows."""
    R: gl.constexpr = 16 * WARPS * T
    one = gl.full([R, 4], 1.0, gl.float16, gl.SliceLayout(2, L))
    zero = gl.full([R, 4], 0.0, gl.float16, gl.SliceLayout(2, L))
    mine = gl.where(inside[:, None], one, zero)
    other = zero
    if E == 2:
        left, right = _column(lead, WARPS, T)
        second = gl.convert_layout(left + right, gl.SliceLayout(2, L), assert_trivial=True) > 0
        other = gl.where(second, mine, zero)
        mine = gl.where(second, zero, mine)
    LF: gl.constexpr = rows_layout(4, WARPS, T)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, LF)))[None, :, None]
    kind = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LF)))[None, None, :] % 2
    none = gl.full([R, 4, 4], 0.0, gl.float16, LF)
    flags = gl.where((lane == 0) & (kind == 0), gl.convert_layout(mine, gl.SliceLayout(2, LF), assert_trivial=True)[:, :, None], none)
    if E == 2:
        flags = gl.where((lane == 0) & (kind == 1), gl.convert_layout(other, gl.SliceLayout(2, LF), assert_trivial=True)[:, :, None], flags)
    return mine, other, flags


@gluon.jit
def _normalised(a, gamma, beta, eps, C: gl.constexpr, L: gl.constexpr):
    """LayerNorm of rows, rounded."""
    a = a - (gl.sum(gl.sum(a, 2), 1) / C)[:, None, None]
    a = a * gl.rsqrt(gl.sum(gl.sum(a * a, 2), 1) / C + eps)[:, None, None]
    return (a * gamma.load(gl.SliceLayout(0, L))[None, :, :] + beta.load(gl.SliceLayout(0, L))[None, :, :]).to(gl.float16)


@gluon.jit
def _chunks(rows, C: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):
    """Rows as chunks of the 32 channels that stand side by side in a product."""
    if C == 32:
        chunks = (rows,)
    else:
        first, second = gl.split(gl.permute(gl.reshape(rows, [16 * WARPS * T, 4, 2, 8]), [0, 1, 3, 2]))
        L: gl.constexpr = rows_layout(8, WARPS, T)
        chunks = (gl.convert_layout(first, L, assert_trivial=True), gl.convert_layout(second, L, assert_trivial=True))
    return chunks


@gluon.jit
def _split_rows(rows, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """Rows as 2 · T groups of eight tokens a warp."""
    if T == 1:
        groups = gl.split(gl.permute(gl.reshape(rows, [WARPS, 2, 8, 4, I]), [0, 2, 3, 4, 1]))
    else:
        first, second = gl.split(gl.permute(gl.reshape(rows, [2, WARPS, 2, 8, 4, I]), [1, 3, 4, 5, 2, 0]))
        groups = gl.split(first) + gl.split(second)
    return groups


@gluon.jit
def _join_rows(groups, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """And back."""
    if T == 1:
        rows = gl.permute(gl.join(groups[0], groups[1]), [0, 4, 1, 2, 3])
    else:
        rows = gl.permute(gl.join(gl.join(groups[0], groups[1]), gl.join(groups[2], groups[3])), [5, 0, 4, 1, 2, 3])
    return gl.convert_layout(gl.reshape(rows, [16 * WARPS * T, 4, I]), rows_layout(I, WARPS, T), assert_trivial=True)


@gluon.jit
def _later(last, rows, I: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):  # noqa: E741
    """Rows eight tokens further back: the last group of the tile before, and all of this one but the last group, which is the second result."""
    groups = _split_rows(rows, I, T, WARPS)
    if T == 1:
        later = _join_rows((last, groups[0]), I, T, WARPS)
    else:
        later = _join_rows((last, groups[0], groups[1], groups[2]), I, T, WARPS)
    return later, groups[2 * T - 1]


@gluon.jit
def _split_tokens(values, T: gl.constexpr, WARPS: gl.constexpr):
    """(32, tokens) as 2 · T groups of eight tokens a warp."""
    if T == 1:
        groups = gl.split(gl.permute(gl.reshape(values, [32, 2, 8 * WARPS]), [0, 2, 1]))
    else:
        first, second = gl.split(gl.permute(gl.reshape(values, [32, 2, 2, 8 * WARPS]), [0, 3, 2, 1]))
        groups = gl.split(first) + gl.split(second)
    return groups


@gluon.jit
def _neighbours(groups, FIRST: gl.constexpr, BEHIND: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr):
    """Right operand (16 tokens, tiles · 32 channels · warps) of the groups FIRST and FIRST + BEHIND, of each tile two groups further on."""
    L: gl.constexpr = gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8]), 2)
    pair = gl.join(groups[FIRST], groups[FIRST + BEHIND])
    if T == 2:
        pair = gl.join(pair, gl.join(groups[FIRST + 2], groups[FIRST + BEHIND + 2]))
    pair = gl.permute(gl.reshape(pair, [4, 8, WARPS, 8, 2, T]), [4, 3, 5, 0, 2, 1])
    return gl.convert_layout(gl.reshape(pair, [16, 32 * WARPS * T]), L, assert_trivial=True)


@gluon.jit
def _by_warp(acc, T: gl.constexpr, WARPS: gl.constexpr):
    """(tokens, 32) sums as (16 tokens, tiles · channels · warps): products in which every warp has a right operand of its own."""
    a = gl.permute(gl.reshape(acc, [T, WARPS, 16, 4, 8]), [2, 0, 3, 1, 4])
    return gl.convert_layout(gl.reshape(a, [16, 32 * WARPS * T]), gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8]), assert_trivial=True)


@gluon.jit
def _by_token(acc, T: gl.constexpr, WARPS: gl.constexpr):
    """And back."""
    a = gl.permute(gl.reshape(acc, [16, T, 4, WARPS, 8]), [1, 3, 0, 2, 4])
    return gl.convert_layout(gl.reshape(a, [16 * WARPS * T, 32]), gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8]), assert_trivial=True)
