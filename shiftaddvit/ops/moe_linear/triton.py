"""Launches of the mixture kernels."""

import torch
from torch import Tensor

from ..tiling import Tile, fill, key, next_power, pick, precision
from .kernels import dual_kernel, order_kernel, partition_kernel

WINDOW = 512
"""Rows that are sorted by expert together; with tiles of 64 rows one tile in eight is computed twice."""


def order_rows(x: Tensor, index: Tensor | None, router: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(expert of each row, rows of each window sorted by expert, how many of each window go to the first)."""
    m, k = x.shape
    windows = -(-m // WINDOW)
    order = torch.empty(m, dtype=torch.int32, device=x.device)
    firsts = torch.empty(windows, dtype=torch.int32, device=x.device)
    route = index is None
    if route:
        index = torch.empty(m, dtype=torch.int8, device=x.device)
    if m:
        order_kernel[(windows,)](
            x, router, index, order, firsts, m, k, x.stride(0), ROUTE=route, WINDOW=WINDOW, BK=16, PDL=False, num_warps=8
        )  # fmt: skip
    return index, order, firsts


def pick_tile(name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The dual kernel holds two accumulators, so its tiles are half as wide."""
    start = Tile(64 if name == "moe_partition" else 128, min(64 if name == "moe_dual" else 128, next_power(n)), min(64, next_power(k)))
    tile = fill(start, m, n, device)
    usual = Tile(tile.m, tile.n, tile.k, 8 if tile.m * tile.n >= 128 * 64 else 4, 1 if k <= tile.k else 3)
    bounds = {"m": (16, 128), "n": (32, min(256, next_power(n))), "k": (32, 128), "warps": (4, 8), "stages": (1, 4)}
    return pick(device, key(name + precision(dtype), m, n, k), usual, **bounds)


Extra = tuple[Tensor, Tensor]
"""float32 (M, 2) and (2, N), whose product is added to the output."""


def dual(x: Tensor, index: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, extra: Extra | None = None) -> Tensor:
    """x (M, K), index (M,) of integers 0 and 1, gate (M,), weight (2, N, K), bias (2, N)."""
    (m, k), n = x.shape, weight.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = pick_tile("moe_dual", m, n, k, x.dtype, x.device)
        dual_kernel[(-(-m // tile.m) * -(-n // tile.n),)](
            x, index, gate, weight, bias, *(extra or (None, None)), out, m, n, k, x.stride(0), HAS_GATE=gate is not None,
            HAS_BIAS=bias is not None, HAS_EXTRA=extra is not None, PRECISION=_precision(x), PDL=False, BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


def partition(
    x: Tensor, order: Tensor, firsts: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, extra: Extra | None = None
) -> Tensor:
    """As `dual`, with rows already ordered by `order_rows`."""
    (m, k), n = x.shape, weight.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = pick_tile("moe_partition", m, n, k, x.dtype, x.device)
        partition_kernel[(-(-m // tile.m) * -(-n // tile.n),)](
            x, order, firsts, gate, weight, bias, *(extra or (None, None)), out, m, n, k, x.stride(0), HAS_GATE=gate is not None,
            HAS_BIAS=bias is not None, HAS_EXTRA=extra is not None, PRECISION=_precision(x), PDL=False, WINDOW=WINDOW,
            BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


def prefer_partition(m: int, n: int, k: int) -> bool:
    """Both products cost no more than one while reading x dominates; beyond that, sort."""
    return m >= 8192 and n * k > 115 * (n + k)


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
