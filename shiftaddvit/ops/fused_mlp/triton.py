"""Launches of LayerNorm + linear."""

import torch
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .norm_linear_kernels import norm_linear_kernel, wide_norm_linear_kernel
from .reference import route_rows

WHOLE_ROWS = 256
"""Rows up to this wide are normalised once, in registers, and multiplied by every output tile of the program."""
WHOLE_SINGLE_ROWS = 64
"""The same for float32, whose operands lie in shared memory twice."""

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def norm_tile(m: int, n: int, k: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """For `norm_linear`; `k` ≥ the row where the whole row is kept."""
    single = dtype == torch.float32
    whole = k <= (WHOLE_SINGLE_ROWS if single else WHOLE_ROWS)
    widest = 64 if single and experts == 2 else 128
    start = Tile(m=64 if experts == 2 or k > 128 else 128, n=min(widest, next_power(n)), k=next_power(k, 16) if whole else 32 if single else 64)
    tile = fill(start, m, n, device)
    warps = 8 if tile.m * tile.n * experts * (2 if single else 1) >= 128 * 128 else 4
    usual = Tile(tile.m, tile.n, tile.k, warps, 1 if whole else 3)
    bounds = {"m": (16, 128), "n": (32, min(256, next_power(n))), "warps": (4, 8), "stages": (1, 5)}
    bounds |= {"k": (32, min(256, next_power(k)))} if not single else {} if whole else {"k": (32, 128)}
    return pick(device, key(f"norm_linear{experts}{precision(dtype)}", m, n, k), usual, **bounds)


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, residual: Tensor | None, out_scale: Tensor | None, activation: str, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (M, K), weight (E, N, K), bias (E, N), router (2, K) or its `route_rows` (16, K) if E is 2."""
    (m, k), (experts, n, _) = x.shape, weight.shape
    dtype = torch.int8 if out_scale is not None else (weight if residual is None else residual).dtype
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    choice = torch.empty(m if experts == 2 else 0, dtype=torch.int8, device=x.device)
    if out.numel() == 0:
        return out, choice
    router = route_rows(router, weight.dtype) if router is not None else None
    tile = norm_tile(m, n, k, experts, weight.dtype, x.device)
    flags = dict(
        NORM=norm_weight is not None, EXPERTS=experts, GELU=activation == "gelu", FAST=_fast(weight), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_CHOICE=experts == 2, INT8=out_scale is not None, PRECISION=_precision(weight), PDL=pdl, T=_ELEMENT[weight.dtype],
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps,
    )  # fmt: skip
    tensors = (x, norm_weight, norm_bias, weight, bias, router, residual, out, out_scale, choice, m, n, k, x.stride(0), eps)
    if pdl:
        flags["launch_pdl"] = True
    groups, tiles = -(-n // tile.n), -(-m // tile.m)
    if k <= tile.k:
        # Enough programs to fill the device several times; beyond that each takes more rows with the weights it holds.
        rows = max(1, groups * tiles // (8 * processors(x.device)))
        norm_linear_kernel[(groups * -(-tiles // rows),)](*tensors, ROWS=rows, **flags)
    else:
        statistics = next_power(k) if k <= WHOLE_ROWS else 128
        wide_norm_linear_kernel[(groups * tiles,)](*tensors, BS=statistics, STAGES=tile.stages, **flags)
    return out, choice


def _fast(x: Tensor) -> bool:
    return x.dtype != torch.float32 and not interpreting()


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
