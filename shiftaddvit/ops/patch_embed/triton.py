"""Patch embedding as an implicit matrix product: the patches are gathered tile by tile and never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import normalised_rows, wait_for_inputs
from ..tiling import Tile, fill, key, next_power, pick, precision

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def patch_embed_kernel(
    x, w, bias, gamma, beta, prefix, position, out, M, N, C, H, W, OUT_H, OUT_W, eps,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PLANES: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, PREFIX: tl.constexpr, HAS_POSITION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens m = (picture, row, column) of [LayerNorm](conv(x) + bias) + position, behind PREFIX rows that are copied.

    PLANES: x is (B, C, H, W) and w (N, C·KERNEL²); otherwise x is (B, H·W, C) and w (N, KERNEL²·C).
    """
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    patches = OUT_H * OUT_W
    picture = m // patches
    patch = m % patches
    top = (patch // OUT_W) * STRIDE - PADDING
    left = (patch % OUT_W) * STRIDE - PADDING
    base = picture.to(tl.int64) * H * W * C
    K = KERNEL * KERNEL * C
    acc = tl.zeros((BM, BN), tl.float32)
    wait_for_inputs(PDL)
    if PLANES:
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ks = k + tl.arange(0, BK)
            row = top[:, None] + ((ks // KERNEL) % KERNEL)[None, :]
            column = left[:, None] + (ks % KERNEL)[None, :]
            seen = (m[:, None] < M) & (ks[None, :] < K) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            where = base[:, None] + ((ks // (KERNEL * KERNEL)) * H)[None, :] * W + row * W + column
            a = tl.load(x + where, mask=seen, other=0).to(T)
            b = tl.load(w + n[None, :] * K + ks[:, None], mask=(ks[:, None] < K) & (n[None, :] < N), other=0.0)
            acc = tl.dot(a, b.to(T), acc, input_precision=PRECISION)
    else:
        chunks = tl.cdiv(C, BK)
        for step in tl.range(0, KERNEL * KERNEL * chunks, num_stages=STAGES):
            tap = step // chunks
            cs = (step % chunks) * BK + tl.arange(0, BK)
            row = top + tap // KERNEL
            column = left + tap % KERNEL
            seen = (m < M) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            where = (base + (row * W + column) * C)[:, None] + cs[None, :]
            a = tl.load(x + where, mask=seen[:, None] & (cs[None, :] < C), other=0).to(T)
            b = tl.load(w + n[None, :] * K + (tap * C + cs)[:, None], mask=(cs[:, None] < C) & (n[None, :] < N), other=0.0)
            acc = tl.dot(a, b.to(T), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if NORM:
        acc = normalised_rows(acc, inside, N, eps) * tl.load(gamma + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc + tl.load(beta + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    token = PREFIX + patch
    if HAS_POSITION:
        acc = acc + tl.load(position + token[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    start = picture.to(tl.int64) * (PREFIX + patches)
    tl.store(out + (start + token)[:, None] * N + n[None, :], acc.to(T), mask=inside)
    for p in tl.static_range(PREFIX):
        copied = tl.load(prefix + p * N + n, mask=n < N, other=0.0)
        if HAS_POSITION:
            copied = copied.to(tl.float32) + tl.load(position + p * N + n, mask=n < N, other=0.0).to(tl.float32)
        value = tl.broadcast_to(copied.to(T)[None, :], (BM, BN))
        tl.store(out + (start + p)[:, None] * N + n[None, :], value, mask=inside & (patch == 0)[:, None])


def channel_step(planes: bool, channels: int) -> int:
    """How many input values of a patch are taken at a time."""
    return 64 if planes else min(64, next_power(channels))


def pick_tile(m: int, n: int, k: int, step: int, norm: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    """`step`: channels that can be taken at a time."""
    problem, widest = key(f"patch_embed{'n' if norm else ''}{precision(dtype)}", m, n, k), next_power(n)
    bounds = {"m": (16, 128), "k": (16, step), "warps": (4, 8), "stages": (1, 5)}
    if norm:
        # LayerNorm needs every output of a token in one tile.
        rows = 64 if widest <= 64 and m >= 64 * 264 else 32 if widest <= 256 and m >= 32 * 132 else 16
        step = min(step, 16) if widest > 512 and dtype == torch.float32 else step
        return pick(device, problem, Tile(rows, widest, step, 8 if widest >= 256 or rows == 64 else 4, 2), **bounds)
    tile = fill(Tile(64, min(128, widest), step), m, n, device)
    return pick(device, problem, Tile(tile.m, tile.n, step, tile.warps, 2), n=(32, min(256, widest)), **bounds)


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    prefix: Tensor | None, position: Tensor | None, height: int, width: int, kernel: int, stride: int, padding: int, planes: bool,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W) or (B, H·W, C); weight (N, K) in the order the layout needs."""
    batch, channels = x.shape[0], x.shape[1] if planes else x.shape[2]
    out_h, out_w = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    n, prefixes = weight.shape[0], 0 if prefix is None else prefix.shape[0]
    out = torch.empty(batch, prefixes + out_h * out_w, n, dtype=weight.dtype, device=x.device)
    if out.numel() == 0:
        return out
    m = batch * out_h * out_w
    step = channel_step(planes, channels)
    tile = pick_tile(m, n, weight.shape[1], step, norm_weight is not None, weight.dtype, x.device)
    flags = {"launch_pdl": True} if pdl else {}
    patch_embed_kernel[(-(-m // tile.m) * -(-n // tile.n),)](
        x, weight, bias, norm_weight, norm_bias, prefix, position, out, m, n, channels, height, width, out_h, out_w, eps,
        KERNEL=kernel, STRIDE=stride, PADDING=padding, PLANES=planes, HAS_BIAS=bias is not None, NORM=norm_weight is not None,
        PREFIX=prefixes, HAS_POSITION=position is not None, PRECISION="tf32x3" if weight.dtype == torch.float32 else "tf32",
        PDL=pdl, T=_ELEMENT[weight.dtype], BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out
