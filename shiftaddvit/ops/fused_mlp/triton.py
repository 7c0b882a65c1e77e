"""Launches of the fused MLP kernels."""

import torch
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .conv_linear_kernels import conv_linear_kernel
from .norm_linear_kernels import norm_linear_kernel, wide_norm_linear_kernel

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
    bounds = {"m": (16, 128), "n": (32, min(256, next_power(n))), "warps": (4, 8), "stages": (1, 4)} | ({} if whole else {"k": (32, 128)})
    return pick(device, key(f"norm_linear{experts}{precision(dtype)}", m, n, k), usual, **bounds)


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, residual: Tensor | None, out_scale: Tensor | None, activation: str, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (M, K), weight (E, N, K), bias (E, N), router (2, K) if E is 2."""
    (m, k), (experts, n, _) = x.shape, weight.shape
    out = torch.empty(m, n, dtype=torch.int8 if out_scale is not None else x.dtype, device=x.device)
    choice = torch.empty(m if experts == 2 else 0, dtype=torch.int8, device=x.device)
    if out.numel() == 0:
        return out, choice
    tile = norm_tile(m, n, k, experts, weight.dtype, x.device)
    flags = dict(
        NORM=norm_weight is not None, EXPERTS=experts, GELU=activation == "gelu", FAST=_fast(x), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_CHOICE=experts == 2, INT8=out_scale is not None, PRECISION=_precision(x), PDL=pdl,
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    tensors = (x, norm_weight, norm_bias, weight, bias, router, residual, out, out_scale, choice, m, n, k, x.stride(0), eps)
    if pdl:
        flags["launch_pdl"] = True
    if k <= tile.k:
        wanted, rows = -(-n // tile.n), -(-m // tile.m)
        # Enough programs to fill the device twice; beyond that each keeps its rows for several output tiles.
        tiles = max(1, min(wanted, rows * wanted // (2 * processors(x.device))))
        tiles = 1 << (tiles.bit_length() - 1)
        norm_linear_kernel[(rows * -(-n // (tile.n * tiles)),)](*tensors, TILES=tiles, **flags)
    else:
        wide_norm_linear_kernel[(-(-m // tile.m) * -(-n // tile.n),)](*tensors, **flags)
    return out, choice


def conv_tile(m: int, n: int, k: int, experts: int, whole_output: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    """For `conv_linear`. Rows are convolved again for every output tile, so one tile covers all outputs where programs suffice."""
    problem, widest = key(f"conv_linear{experts}{'n' if whole_output else ''}{precision(dtype)}", m, n, k), next_power(n)
    bounds = {"m": (16, 128), "k": (32, min(512, next_power(k))), "warps": (4, 8), "stages": (1, 4)}
    if whole_output:
        return pick(device, problem, Tile(32 if widest * experts <= 256 else 16, widest, 32, 8, 1), **bounds)
    tile = fill(Tile(m=64, n=min(widest, 128), k=32), m, n, device)
    if tile.m <= 32 and -(-m // tile.m) * -(-n // tile.n) < 2 * processors(device):
        # Few programs wait for memory: take more channels at a time and prefetch. Many are bound by instructions.
        usual = Tile(tile.m, tile.n, min(64, next_power(k)), 4, 2)
    else:
        # Two experts of 64 columns and more need the registers of eight warps.
        usual = Tile(tile.m, tile.n, 32, 8 if tile.n * experts > 64 else 4, 1)
    return pick(device, problem, usual, n=(32, min(256, widest)), **bounds)


def conv_linear(
    h: Tensor, height: int, width: int, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, residual: Tensor | None, h_scale: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, half_taps: bool, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h (M, K) tokens of pictures of height · width, conv_weight (9, K), weight (E, N, K), bias (E, N), h_scale (K,) for int8 h."""
    (m, k), (experts, n, _) = h.shape, weight.shape
    out = torch.empty(m, n, dtype=weight.dtype, device=h.device)
    choice = torch.empty(m if experts == 2 else 0, dtype=torch.int8, device=h.device)
    if out.numel() == 0:
        return out, choice
    norm = norm_weight is not None
    tile = conv_tile(m, n, k, experts, norm, weight.dtype, h.device)
    flags = {"launch_pdl": True} if pdl else {}
    conv_linear_kernel[(-(-m // tile.m) * -(-n // tile.n),)](
        h, h_scale, conv_weight, conv_bias, weight, bias, router, residual, norm_weight, norm_bias, out, choice,
        m, n, k, height, width, eps,
        EXPERTS=experts, FAST=_fast(weight), HALF=half_taps and h.dtype == torch.float16 and not interpreting(),
        HAS_SCALE=h_scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_CHOICE=experts == 2,
        NORM=norm, PRECISION=_precision(weight), PDL=pdl, T=_ELEMENT[weight.dtype],
        BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out, choice


def _fast(x: Tensor) -> bool:
    return x.dtype != torch.float32 and not interpreting()


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
