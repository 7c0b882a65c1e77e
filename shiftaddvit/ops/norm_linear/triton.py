"""Launches of LayerNorm + linear."""

import torch
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..layer_norm.triton import layer_norm
from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .kernels import norm_linear_kernel, wide_linear_kernel
from .reference import route_rows

WHOLE_ROWS = 256
"""Rows up to this wide can be normalised in registers, and multiplied by every output tile of the program; many of more than 64 channels are
not, for whom a kernel of its own for the norm is faster."""
WHOLE_SINGLE_ROWS = 64
"""The same for float32, whose operands lie in shared memory twice."""

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def norm_tile(m: int, n: int, k: int, experts: int, norm: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    """For `norm_linear`; `k` ≥ the row where the whole row is kept, which spares a norm its own kernel."""
    single, widest, tokens = dtype == torch.float32, next_power(n), m > 16 * processors(device)
    whole = k <= (WHOLE_SINGLE_ROWS if single else (WHOLE_ROWS if norm and not (tokens and k > 64) else 64))
    # Chunks of two experts have two sums: half the columns, unless the chunks are short.
    columns = 64 if experts == 2 and (single or not (whole or norm)) else 128
    tile = fill(Tile(m=64 if tokens or k > 128 else 32, n=min(columns, widest), k=16), m, n, device)
    if whole:
        usual = Tile(tile.m, tile.n, next_power(k), 8 if single and experts == 2 else 4)
    elif single:
        usual = Tile(tile.m, tile.n, 32, 8 if tile.m * tile.n * experts >= 64 * 128 else 4, 3)
    else:
        chunk = 256 if not tokens else 32 if norm and experts == 2 else 64
        usual = Tile(tile.m, tile.n, min(next_power(k), chunk), 4, 4 if experts == 2 and tokens and not norm else 3)
    bounds = {"m": (16, 128), "n": (32, min(256, widest)), "warps": (4, 8), "stages": (1, 5)}
    bounds |= {"k": (32, min(256, next_power(k)))} if not single else {} if whole else {"k": (32, 128)}
    return pick(device, key(f"{'norm_' if norm else ''}linear{experts}{precision(dtype)}", m, n, k), usual, **bounds)


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
    if router is not None and len(router) != 16:
        # Made only now, by kernels that the next one must wait for before it reads a weight.
        router, pdl = route_rows(router, weight.dtype), False
    norm = norm_weight is not None
    tile = norm_tile(m, n, k, experts, norm, weight.dtype, x.device)
    flags = dict(
        EXPERTS=experts, GELU=activation == "gelu", FAST=_fast(weight), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_CHOICE=experts == 2, INT8=out_scale is not None, PRECISION=_precision(weight), PDL=pdl, T=_ELEMENT[weight.dtype],
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if pdl:
        flags["launch_pdl"] = True
    wanted, rows = -(-n // tile.n), -(-m // tile.m)
    if k <= tile.k:
        # Enough programs to fill the device twice; beyond that each keeps its rows for several output tiles.
        tiles = max(1, min(wanted, rows * wanted // (2 * processors(x.device))))
        tiles = 1 << (tiles.bit_length() - 1)
        norm_linear_kernel[(rows * -(-n // (tile.n * tiles)),)](
            x, norm_weight, norm_bias, weight, bias, router, residual, out, out_scale, choice, m, n, k, x.stride(0), eps,
            NORM=norm, TILES=tiles, **flags,
        )  # fmt: skip
        return out, choice
    if norm:
        x = layer_norm(x.unsqueeze(0), norm_weight, norm_bias, eps, False, pdl, weight.dtype)[0]
    wide_linear_kernel[(rows * wanted,)](x, weight, bias, router, residual, out, out_scale, choice, m, n, k, x.stride(0), **flags)
    return out, choice


def _fast(x: Tensor) -> bool:
    return x.dtype != torch.float32 and not interpreting()


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
