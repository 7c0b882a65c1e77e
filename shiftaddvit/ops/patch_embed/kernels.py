"""Patch embedding as an implicit matrix product: the patches are gathered tile by tile and never stored.

Pictures and tokens have a kernel each. Where outputs are too few to fill the device, parts of the patch are multiplied by programs of their
own and added, always in the same order, by a second kernel.
"""

import triton
import triton.language as tl

from ..tiles import normalised_rows, wait_for_inputs


@triton.jit
def finish(
    acc, out, bias, gamma, beta, prefix, position, valid, start, patch, n, N, eps,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, PREFIX: tl.constexpr, HAS_POSITION: tl.constexpr, T: tl.constexpr,
    FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store [LayerNorm](acc + bias) + position of the tokens (start + PREFIX + patch), and the PREFIX rows of pictures that begin here.

    acc: (BM, BN); per row: `valid`, `patch` within its picture, and `start`, the picture's first row of `out`, in 64 bits.
    """
    inside = valid[:, None] & (FULL | (n[None, :] < N))
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if NORM:
        acc = normalised_rows(acc, FULL | (n[None, :] < N), N, eps) * tl.load(gamma + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc + tl.load(beta + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    token = PREFIX + patch
    if HAS_POSITION:
        acc = acc + tl.load(position + token[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (start + token)[:, None] * N + n[None, :], acc.to(T), mask=inside)
    for p in tl.static_range(PREFIX):
        copied = tl.load(prefix + p * N + n, mask=n < N, other=0.0)
        if HAS_POSITION:
            copied = copied.to(tl.float32) + tl.load(position + p * N + n, mask=n < N, other=0.0).to(tl.float32)
        value = tl.broadcast_to(copied.to(T)[None, :], (BM, BN))
        tl.store(out + (start + p)[:, None] * N + n[None, :], value, mask=inside & (patch == 0)[:, None])


@triton.jit
def picture_step(
    acc, step, pixels, where, w, weights, across, row, down, line, k, n, N, C, H, W,
    KERNEL: tl.constexpr, SIDE: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, SHARES: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc plus the products of the step's window rows."""
    channel = step // SHARES * CHANNELS
    skipped = step % SHARES * LINES
    # Rows above the picture are large numbers without sign.
    seen = across & ((row + skipped).to(tl.uint32, bitcast=True) < tl.cast(H, tl.uint32)) & (down + skipped < KERNEL)
    if CHANNELS > 1:
        seen = seen & (channel + line // SIDE < C)
    a = tl.load(pixels + (channel * H + skipped) * W + where, mask=seen, other=0).to(T)
    a = tl.reshape(a, (BM, BK))
    if CHANNELS > 1:
        b = tl.load(w + step * BK + weights, mask=(step * BK + k[:, None] < C * (SIDE * SIDE)) & (n[None, :] < N), other=0.0)
    elif FULL:
        b = tl.load(w + step * BK + weights)
    else:
        b = tl.load(w + step * BK + weights, mask=n[None, :] < N, other=0.0)
    return tl.dot(a, b.to(T), acc, input_precision=PRECISION)


@triton.jit
def picture_embed_kernel(
    x, w, bias, gamma, beta, prefix, position, out, N, C, H, W, OUT_H, OUT_W, eps,
    KERNEL: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, PREFIX: tl.constexpr, HAS_POSITION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, ACROSS: tl.constexpr, TILES_X: tl.constexpr, TILES_Y: tl.constexpr, TILES_N: tl.constexpr, STEPS: tl.constexpr,
    UNROLLED: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[LayerNorm](conv(x) + bias) + position of x (B, C, H, W), behind PREFIX rows that are copied.

    A program has BM / ACROSS rows of ACROSS neighbouring tokens of one picture, so that nothing is divided and threads side by side read
    pixels side by side; a picture has TILES_X × TILES_Y programs. A window is SIDE² pixels, a power of two, and begins SIDE − KERNEL columns early,
    where w (N, C·SIDE²) is zero: with 7 × 7 windows, stride 4 and padding 3 at a multiple of four pixels. A step takes BK / SIDE window rows,
    of one channel or of several whole ones.
    """
    TALL: tl.constexpr = BM // ACROSS
    LINES: tl.constexpr = BK // SIDE
    CHANNELS: tl.constexpr = LINES // SIDE if LINES > SIDE else 1
    SHARES: tl.constexpr = 1 if LINES > SIDE else SIDE // LINES
    tile = tl.program_id(0) // TILES_N
    n = (tl.program_id(0) % TILES_N) * BN + tl.arange(0, BN)
    picture = (tile // (TILES_X * TILES_Y)).to(tl.int64)
    first_y = (tile // TILES_X) % TILES_Y * TALL
    first_x = tile % TILES_X * ACROSS
    t = tl.arange(0, BM)
    out_x = first_x + t % ACROSS
    out_y = first_y + t // ACROSS
    valid = (out_x < OUT_W) & (out_y < OUT_H)

    # A tile of pixels is (token, window row, window column); columns, then tokens are what neighbouring threads differ in.
    line = tl.arange(0, LINES)[None, :, None]
    column = (out_x * STRIDE - (PADDING + SIDE - KERNEL))[:, None, None] + tl.arange(0, SIDE)[None, None, :]
    top = (out_y * STRIDE - PADDING)[:, None, None]
    across = valid[:, None, None] & (column >= 0) & (column < W)
    down = line % SIDE
    where = (line // SIDE) * (H * W) + (top + down) * W + column
    k = tl.arange(0, BK)
    weights = n[None, :] * (C * (SIDE * SIDE)) + k[:, None]
    pixels = x + picture * H * W * C
    acc = tl.zeros((BM, BN), tl.float32)
    wait_for_inputs(PDL)
    if UNROLLED:
        for step in tl.static_range(STEPS):
            acc = picture_step(
                acc, step, pixels, where, w, weights, across, top + down, down, line, k, n, N, C, H, W, KERNEL, SIDE, LINES, CHANNELS, SHARES,
                FULL, PRECISION, T, BM, BK,
            )  # fmt: skip
    else:
        for step in tl.range(0, STEPS, num_stages=STAGES):
            acc = picture_step(
                acc, step, pixels, where, w, weights, across, top + down, down, line, k, n, N, C, H, W, KERNEL, SIDE, LINES, CHANNELS, SHARES,
                FULL, PRECISION, T, BM, BK,
            )  # fmt: skip
    start = picture * (PREFIX + OUT_H * OUT_W) + tl.zeros((BM,), tl.int64)
    finish(
        acc, out, bias, gamma, beta, prefix, position, valid, start, out_y * OUT_W + out_x, n, N, eps, HAS_BIAS, NORM, PREFIX,
        HAS_POSITION, T, FULL, BM, BN,
    )  # fmt: skip


@triton.jit
def patch_embed_kernel(
    x, w, bias, gamma, beta, prefix, position, out, M, N, C, H, W, OUT_H, OUT_W, steps, eps,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, PREFIX: tl.constexpr,
    HAS_POSITION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr,
    FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens m = (picture, row, column) of [LayerNorm](conv(x) + bias) + position for x (B, H·W, C), behind PREFIX rows that are copied.

    A window's row is KERNEL·C values side by side, of x as of w (N, KERNEL²·C), and is cut into CHUNKS steps of BK values. With PARTS > 1 a program
    takes `steps` of them and its sums go as they are to out (PARTS, M, N), float32.
    """
    tiles_n = tl.cdiv(N, BN)
    tile = tl.program_id(0) // tiles_n
    m = tile * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    patches = OUT_H * OUT_W
    picture = m // patches
    patch = m % patches
    top = (patch // OUT_W) * STRIDE - PADDING
    left = (patch % OUT_W) * STRIDE - PADDING
    run = KERNEL * C
    # Of a window's row, what lies in the picture: columns 0 to W − 1.
    low = tl.maximum(-left, 0) * C
    high = tl.minimum(W - left, KERNEL) * C
    # From the tile's first picture on, 32 bits reach.
    first = tile * BM // patches
    values = x + first.to(tl.int64) * H * W * C
    k = tl.arange(0, BK)
    where = (((picture - first) * H + top) * W + left)[:, None] * C + k[None, :]
    weights = n[None, :] * (KERNEL * run) + k[:, None]
    begin, end = 0, KERNEL * CHUNKS
    if PARTS > 1:
        begin = tl.program_id(1) * steps
        end = tl.minimum(begin + steps, end)
    acc = tl.zeros((BM, BN), tl.float32)
    wait_for_inputs(PDL)
    for step in tl.range(begin, end, num_stages=STAGES):
        down = step // CHUNKS
        skipped = step % CHUNKS * BK
        row = top + down
        here = skipped + k
        seen = (here[None, :] >= low[:, None]) & (here[None, :] < high[:, None]) & ((m < M) & (row >= 0) & (row < H))[:, None]
        a = tl.load(values + (down * W * C + skipped) + where, mask=seen, other=0).to(T)
        b = tl.load(w + (down * run + skipped) + weights, mask=(here[:, None] < run) & (n[None, :] < N), other=0.0)
        acc = tl.dot(a, b.to(T), acc, input_precision=PRECISION)
    if PARTS > 1:
        rows = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(rows + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))
    else:
        finish(
            acc, out, bias, gamma, beta, prefix, position, m < M, picture.to(tl.int64) * (PREFIX + patches), patch, n, N, eps, HAS_BIAS, NORM,
            PREFIX, HAS_POSITION, T, FULL, BM, BN,
        )  # fmt: skip


@triton.jit
def patch_sum_kernel(
    parts, bias, gamma, beta, prefix, position, out, M, N, patches, eps,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, PREFIX: tl.constexpr, HAS_POSITION: tl.constexpr, PDL: tl.constexpr, T: tl.constexpr,
    PARTS: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[LayerNorm](sum of parts (PARTS, M, N) + bias) + position, behind PREFIX rows that are copied."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    acc = tl.zeros((BM, BN), tl.float32)
    wait_for_inputs(PDL)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts + part * M * N + m[:, None] * N + n[None, :], mask=inside, other=0.0)
    finish(
        acc, out, bias, gamma, beta, prefix, position, m < M, (m // patches).to(tl.int64) * (PREFIX + patches), m % patches, n, N, eps, HAS_BIAS,
        NORM, PREFIX, HAS_POSITION, T, FULL, BM, BN,
    )  # fmt: skip
