"""Adder products on the GPU: sums of absolute differences in registers; nothing of size M·N·K exists."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import Tile, fill, next_power


@triton.jit
def distance_kernel(x, w, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr):
    """out[g, m, n] = −Σ_k |w[g, k, n] − x[g, k, m]| from x (G, K, M) and w (G, K, N): both operands of a step are contiguous vectors."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x += group * K * M
    w += group * K * N
    out += group * M * N
    m = (tile // tiles_n) * BM + tl.arange(0, BM)
    n = (tile % tiles_n) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    left, top = x + m, w + n
    for k in tl.range(0, K, UNROLL, num_stages=1):
        for step in tl.static_range(UNROLL):
            rows = tl.where(k + step < K, M, 0)
            columns = tl.where(k + step < K, N, 0)
            a = tl.load(left, mask=m < rows, other=0.0).to(tl.float32)
            b = tl.load(top, mask=n < columns, other=0.0).to(tl.float32)
            total += tl.abs(b[None, :] - a[:, None])
            left += M
            top += N
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(where, (-total).to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def grad_x_kernel(x, w, grad, out, M, N, K, BM: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr):
    """out[g, m, k] = Σ_n clamp(w[g, n, k] − x[g, m, k], −1, 1) · grad[g, n, m] from x (G, M, K), w (G, N, K) and grad (G, N, M)."""
    tiles_k = tl.cdiv(K, BK)
    tiles = tl.cdiv(M, BM) * tiles_k
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x += group * M * K
    w += group * N * K
    grad += group * N * M
    out += group * M * K
    m = (tile // tiles_k) * BM + tl.arange(0, BM)
    k = (tile % tiles_k) * BK + tl.arange(0, BK)
    inside = (m[:, None] < M) & (k[None, :] < K)
    where = m[:, None].to(tl.int64) * K + k[None, :]
    here = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BM, BK), tl.float32)
    top, side = w + k, grad + m
    for n in tl.range(0, N, UNROLL, num_stages=1):
        for step in tl.static_range(UNROLL):
            columns = tl.where(n + step < N, K, 0)
            rows = tl.where(n + step < N, M, 0)
            b = tl.load(top, mask=k < columns, other=0.0).to(tl.float32)
            g = tl.load(side, mask=m < rows, other=0.0).to(tl.float32)
            difference = b[None, :] - here
            clamped = tl.minimum(tl.maximum(difference, -1.0), 1.0)
            # The hardware's minimum and maximum drop a NaN, which has to stay visible.
            total += tl.where(difference == difference, clamped, difference) * g[:, None]
            top += K
            side += M
    tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)


def distance(x: Tensor, weight: Tensor) -> Tensor:
    """x (*G, M, K), weight (*G, N, K) → (*G, M, N)."""
    (*groups, m, k), n = x.shape, weight.shape[-2]
    out = torch.empty(*groups, m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = _tile(m, n, x.device)
        grid = (prod(groups) * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
        left, top = x.transpose(-2, -1).contiguous(), weight.transpose(-2, -1).contiguous()
        distance_kernel[grid](left, top, out, m, n, k, BM=tile.m, BN=tile.n, UNROLL=4, num_warps=tile.warps)
    return out


def grad_x(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """grad (*G, M, N) of the distance → gradient of x (*G, M, K), with the difference in place of its sign, clamped."""
    (*groups, m, k), n = x.shape, weight.shape[-2]
    out = torch.empty(*groups, m, k, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = _tile(m, k, x.device)
        grid = (prod(groups) * triton.cdiv(m, tile.m) * triton.cdiv(k, tile.n),)
        side = grad.transpose(-2, -1).contiguous()
        grad_x_kernel[grid](
            x.contiguous(), weight.contiguous(), side, out, m, n, k, BM=tile.m, BK=tile.n, UNROLL=4, num_warps=tile.warps
        )
    return out


def _tile(m: int, n: int, device: torch.device) -> Tile:
    tile = fill(Tile(64, min(64, next_power(n)), 16), m, n, device)
    return Tile(tile.m, tile.n, 16, 4)
