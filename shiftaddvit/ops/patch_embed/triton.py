"""Patch embedding as an implicit matrix product: the patches are gathered tile by tile and never stored.

Pictures and tokens have a kernel each. Where outputs are too few to fill the device, parts of the patch are multiplied by programs of their
own and added, always in the same order, by a second kernel.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import normalised_rows, wait_for_inputs
from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .reference import padded_side

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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


def picture_tile(m: int, n: int, k: int, side: int, norm: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    """For pictures, windows padded to `side`."""
    problem, widest, single = key(f"patch_embedp{'n' if norm else ''}{precision(dtype)}", m, n, k), next_power(n), dtype == torch.float32
    least = max(16, side)
    step = max(least, 32 if single else 64)
    bounds = {"m": (16, 128 if single else 256), "k": (least, max(least, 128)), "warps": (4, 8), "stages": (1, 4)}
    if norm:
        # LayerNorm needs every output of a token in one tile.
        rows = next((rows for rows in (128, 64, 32) if rows * widest <= 8192 and m >= rows * (264 if rows == 128 else 90)), 16)
        step = least if widest > 512 and single else step
        warps = 8 if widest >= 256 or rows == 128 else 4
        return pick(device, problem, Tile(rows, widest, step, warps, 1 if k <= 4 * step else 2 if single else 3), **bounds)
    tile = fill(Tile(64, min(128, widest), step), m, n, device)
    stages = 1 if k <= 4 * step else 2 if single else 3
    return pick(device, problem, Tile(tile.m, tile.n, step, tile.warps, stages), n=(32, min(256, widest)), **bounds)


def tokens_tile(m: int, n: int, k: int, run: int, norm: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    """For tokens, windows with rows of `run` values."""
    problem, widest, single = key(f"patch_embed{'n' if norm else ''}{precision(dtype)}", m, n, k), next_power(n), dtype == torch.float32
    narrow = widest <= 64 and not single
    step = run_step(run, 32 if single else 128 if narrow else 64)
    bounds = {"m": (16, 128), "k": (16, 64 if single else 256), "warps": (4, 8), "stages": (1, 5)}
    if norm:
        # LayerNorm needs every output of a token in one tile.
        most = 32 if single else 128 if widest <= 256 else 64
        programs = {128: 264, 64: 132} if narrow else {128: 90, 64: 90}
        rows = next((rows for rows in (128, 64, 32) if rows <= most and m >= rows * programs.get(rows, 132)), 16)
        step = 16 if widest > 512 and single else step
        stages = 2 if single or (rows == 128 and step == 128) else 4 if narrow and k >= 1024 else 3
        return pick(device, problem, Tile(rows, widest, step, 8 if rows * widest >= 128 * 64 or widest >= 256 else 4, stages), **bounds)
    tile = fill(Tile(64, min(128, widest), step), m, n, device)
    return pick(device, problem, Tile(tile.m, tile.n, step, tile.warps, 2 if single else 3), n=(32, min(256, widest)), **bounds)


def part_tile(m: int, n: int, k: int, run: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """For tokens that are too few: the tile of one part of a patch."""
    step = run_step(run, 32 if dtype == torch.float32 else 64)
    usual = Tile(min(64, next_power(m)), 32, step, 4, 2)
    bounds = {"m": (16, 64), "n": (32, min(128, next_power(n, 32))), "k": (16, 128), "warps": (4, 8), "stages": (1, 4)}
    return pick(device, key(f"patch_embed_part{precision(dtype)}", m, n, k), usual, **bounds)


def run_step(run: int, most: int) -> int:
    """How many of `run` values to take at a time, up to `most`: few steps, little padding. A step costs about as much as 32 values."""
    return min((step for step in (128, 64, 32, 16) if step <= most), key=lambda step: -(-run // step) * (step + 32))


def parts_for(m: int, n: int, kernel: int, run: int, device: torch.device) -> int:
    """Into how many parts to cut the patches of m tokens: so many that the device is filled, 1 where a second kernel costs more than it saves."""
    steps = kernel * -(-run // 64)
    parts = min(steps, 32, processors(device) // (-(-m // 64) * -(-n // 32)))
    return parts if parts > 1 and steps - steps / parts > 6 else 1


def columns_across(rows: int, out_h: int, out_w: int) -> int:
    """Of a tile of `rows` tokens, how many lie side by side: where fewest are wasted, then as many as can."""
    widths = [width for width in (256, 128, 64, 32, 16) if width <= min(rows, next_power(out_w))]
    return min(widths, key=lambda width: -(-out_w // width) * -(-out_h // (rows // width)))


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    prefix: Tensor | None, position: Tensor | None, height: int, width: int, kernel: int, stride: int, padding: int, planes: bool,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W) or (B, H·W, C); weight (N, K) in the order the layout needs."""
    batch, channels = x.shape[0], x.shape[1] if planes else x.shape[2]
    out_h, out_w = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    n, prefixes, device = weight.shape[0], 0 if prefix is None else prefix.shape[0], x.device
    out = torch.empty(batch, prefixes + out_h * out_w, n, dtype=weight.dtype, device=device)
    if out.numel() == 0:
        return out
    m, norm, single = batch * out_h * out_w, norm_weight is not None, weight.dtype == torch.float32
    vectors = (bias, norm_weight, norm_bias, prefix, position)
    sizes = (n, channels, height, width, out_h, out_w)
    flags = {"launch_pdl": True} if pdl else {}
    end = {"HAS_BIAS": bias is not None, "NORM": norm, "PREFIX": prefixes, "HAS_POSITION": position is not None, "PDL": pdl,
           "T": _ELEMENT[weight.dtype]}  # fmt: skip
    window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding, "PRECISION": "tf32x3" if single else "tf32"}
    if planes:
        side = padded_side(kernel)
        tile = picture_tile(m, n, weight.shape[1], side, norm, weight.dtype, device)
        lines = tile.k // side
        steps = -(-channels // (lines // side)) if lines > side else channels * (side // lines)
        across = columns_across(tile.m, out_h, out_w)
        tiles = {"TILES_X": -(-out_w // across), "TILES_Y": -(-out_h // (tile.m // across)), "TILES_N": -(-n // tile.n)}
        # Few steps without a pipeline are written out, so that one step's loads run under another's products.
        loop = {"STEPS": steps, "UNROLLED": steps <= 4 and tile.stages == 1, "STAGES": tile.stages}
        picture_embed_kernel[(batch * math.prod(tiles.values()),)](
            x, weight, *vectors, out, *sizes, eps, **window, **end, **tiles, **loop, SIDE=side, ACROSS=across, FULL=n % tile.n == 0, BM=tile.m,
            BN=tile.n, BK=tile.k, num_warps=tile.warps, **flags,
        )  # fmt: skip
        return out
    run = kernel * channels
    parts = parts_for(m, n, kernel, run, device)
    if parts > 1:
        tile = part_tile(m, n, weight.shape[1], run, weight.dtype, device)
    else:
        tile = tokens_tile(m, n, weight.shape[1], run, norm, weight.dtype, device)
    chunks = -(-run // tile.k)
    steps = kernel * chunks
    each = -(-steps // parts)
    parts = -(-steps // each)
    sums = torch.empty(parts, m, n, dtype=torch.float32, device=device) if parts > 1 else out
    patch_embed_kernel[(-(-m // tile.m) * -(-n // tile.n), parts)](
        x, weight, *vectors, sums, m, *sizes, each, eps, **window, **end, PARTS=parts, CHUNKS=chunks, FULL=n % tile.n == 0, BM=tile.m,
        BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    if parts > 1:
        widest = next_power(n)
        rows = max(1, min(4, 1024 // widest))
        patch_sum_kernel[(-(-m // rows),)](
            sums, *vectors, out, m, n, out_h * out_w, eps, **end, PARTS=parts, FULL=n == widest, BM=rows, BN=widest, num_warps=4, **flags,
        )  # fmt: skip
    return out
