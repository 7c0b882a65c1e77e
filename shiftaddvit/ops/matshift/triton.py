"""MatShift on the GPU: the exact product on the matrix units, weights expanded beforehand or decoded from codes on the fly."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..tiles import gelu, store_int8, wait_for_inputs
from ..tiling import Tile, fill, key, next_power, pick, precision


@triton.jit
def _decode(nibbles, signs, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, T: tl.constexpr):
    """(BN, BK/2) bytes of low halves and (BN, BK/8) bytes of signs → exact (BN, BK) weights of dtype T, by placing bits."""
    low = nibbles.to(tl.int16)
    code = tl.interleave(low & 15, (low >> 4) & 15)
    if BITS == 5:
        e = code
        places = tl.arange(0, 8).to(tl.int16)
        sign = tl.reshape((signs.to(tl.int16)[:, :, None] >> places[None, None, :]) & 1, (BN, BK))
    else:
        e = code & 7
        sign = code >> 3
    # The weight's exponent is e − 15 (5 bits) or e − 7 (4 bits); both formats' biases make that a constant added to the field.
    if T == tl.float16:
        field = tl.where(e == 0, 0, e + (0 if BITS == 5 else 8)) << 10
    else:
        field = tl.where(e == 0, 0, e + (112 if BITS == 5 else 120)) << 7
    return (field | (sign << 15)).to(tl.int16).to(T, bitcast=True)


@triton.jit
def _load_weight(w, n, k, N, K, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, T: tl.constexpr):
    """The (BK, BN) tile of Wᵀ that starts at input channel k."""
    if BITS == 0:
        ks = k + tl.arange(0, BK)
        tile = tl.load(w + n[None, :].to(tl.int64) * K + ks[:, None], mask=(ks[:, None] < K) & (n[None, :] < N), other=0.0)
        return tile.to(T)
    else:
        groups = (K + 7) // 8
        row = w + n[:, None].to(tl.int64) * (groups * BITS)
        half = k // 2 + tl.arange(0, BK // 2)
        nibbles = tl.load(row + half[None, :], mask=(half[None, :] < groups * 4) & (n[:, None] < N), other=0)
        eighth = k // 8 + tl.arange(0, BK // 8)
        signs = tl.load(row + groups * 4 + eighth[None, :], mask=(eighth[None, :] < groups) & (n[:, None] < N) & (BITS == 5), other=0)
        return tl.trans(_decode(nibbles, signs, BITS, BN, BK, T))


@triton.jit
def matshift_kernel(
    x, w, scale, bias, out, M, N, K, stride_x,
    BITS: tl.constexpr, SPLIT: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = act((x Wᵀ) · scale + bias) for a (BM, BN) tile; neighbouring programs share their rows of x."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    T: tl.constexpr = tl.float16 if SPLIT else x.dtype.element_ty
    rows = x + m[:, None].to(tl.int64) * stride_x
    wait_for_inputs(PDL)
    if SPLIT:
        # Each row is brought to [2^14, 2^15) by a power of two, so that two float16 parts hold 22 bits of every large element.
        largest = tl.zeros((BM,), tl.float32)
        for k in tl.range(0, K, BK, num_stages=1):
            ks = k + tl.arange(0, BK)
            part = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(part), 1))
        exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -112), 127)
        up = ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)
        down = ((exponent - 14 + 127) << 23).to(tl.float32, bitcast=True)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        a = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0.0)
        b = _load_weight(w, n, k, N, K, BITS, BN, BK, T)
        if SPLIT:
            a = a * up[:, None]
            high = a.to(tl.float16)
            rest = a - high.to(tl.float32)
            low = tl.where(rest == rest, rest, 0.0).to(tl.float16)  # ∞ − ∞ must not turn an infinity into NaN
            acc = tl.dot(high, b, acc)
            acc = tl.dot(low, b, acc)
        else:
            acc = tl.dot(a, b, acc)
    if SPLIT:
        acc = acc * down[:, None]
    if HAS_SCALE:
        acc = acc * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc, FAST)
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def matshift_int8_kernel(
    x, x_scale, w, w_scale, bias, out, out_scale, M, N, K, stride_x,
    TOKEN_SCALE: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr, REQUANTISE: tl.constexpr,
    PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eight-bit activations times eight-bit powers of two, accumulated exactly in int32; optionally rounded back to eight bits."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    rows = x + m[:, None].to(tl.int64) * stride_x
    columns = w + n[None, :].to(tl.int64) * K
    wait_for_inputs(PDL)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        ks = k + tl.arange(0, BK)
        a = tl.load(rows + ks[None, :], mask=(m[:, None] < M) & (ks[None, :] < K), other=0)
        b = tl.load(columns + ks[:, None], mask=(ks[:, None] < K) & (n[None, :] < N), other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    if TOKEN_SCALE:
        row_scale = tl.load(x_scale + m, mask=m < M, other=0.0)
    else:
        row_scale = tl.load(x_scale + tl.zeros((BM,), tl.int32))
    y = acc.to(tl.float32) * row_scale[:, None] * tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y, FAST)
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    if REQUANTISE:
        store_int8(where, y / tl.load(out_scale), mask)
    else:
        tl.store(where, y.to(out.dtype.element_ty), mask=mask)


def pick_tile(name: str, m: int, n: int, k: int, device: torch.device, widest_k: int = 64) -> Tile:
    """Measured tile, or 128 × 128 shrunk until the device is full."""
    start = Tile(m=128, n=min(128, next_power(n)), k=min(widest_k, next_power(k, 32)))
    tile = fill(start, m, n, device)
    usual = Tile(tile.m, tile.n, tile.k, tile.warps, 1 if k <= tile.k else 3)
    bounds = {"m": (16, 128), "n": (32, min(256, next_power(n))), "k": (32, 128), "warps": (4, 8), "stages": (1, 4)}
    return pick(device, key(name, m, n, k), usual, **bounds)


def matshift(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, activation: str) -> Tensor:
    """x (M, K) with unit stride along K; weight (N, K) or packed (N, bytes)."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    split = x.dtype == torch.float32
    tile = pick_tile(f"matshift{bits}{precision(x.dtype)}", m, n, k, x.device, 32 if split else 64)
    matshift_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        x, weight, scale, bias, out, m, n, k, x.stride(0),
        BITS=bits, SPLIT=split, GELU=activation == "gelu", FAST=not split and not interpreting(),
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, PDL=False,
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def matshift_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, out_scale: Tensor | None,
    activation: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x int8 (M, K), weight int8 (N, K); x_scale of 1 or M elements."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = pick_tile("matshift_int8", m, n, k, x.device, 128)
    matshift_int8_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        x, x_scale, weight, w_scale, bias, out, out_scale, m, n, k, x.stride(0),
        TOKEN_SCALE=x_scale.numel() > 1, GELU=activation == "gelu", FAST=not interpreting(),
        HAS_BIAS=bias is not None, REQUANTISE=out_scale is not None, PDL=False,
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
