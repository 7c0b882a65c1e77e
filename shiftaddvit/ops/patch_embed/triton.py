"""Launches of patch embedding: by pictures, by tokens, or by parts of the patch and their sum."""

import math

import torch
import triton.language as tl
from torch import Tensor

from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .kernels import patch_embed_kernel, patch_sum_kernel, picture_embed_kernel
from .reference import padded_side

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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
