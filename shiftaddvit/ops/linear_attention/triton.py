"""Launches of linear attention: each op is a projection (`norm_linear`) and a small kernel of its own."""

import math

import torch
from torch import Tensor

from ..norm_linear.triton import norm_linear
from ..tiling import Tile, key, next_power, pick, precision, processors
from .kernels import apply_kernel, context_kernel


def context_tile(batch: int, tokens: int, width: int, d: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tokens of a tile; `n` and `k` are not used."""
    rows = min(64 if d <= 64 else 32, next_power(tokens))
    usual = Tile(rows, 16, 16, 4 if d <= 64 else 8, 3 if d <= 32 and dtype != torch.float32 else 2)
    bounds = {"m": (16, 128), "warps": (1, 8), "stages": (1, 4)}
    return pick(device, key(f"context{precision(dtype)}", batch, tokens, width, d), usual, **bounds)


def apply_tile(batch: int, tokens: int, width: int, d: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """`k` is how many tiles of tokens a program takes, one after the other; `n` is not used."""
    wide = dtype == torch.float32 or d > 64
    rows, programs = 32 if wide else 64, batch * (width // d)
    if programs * -(-tokens // rows) < processors(device):
        rows = 32
    rows = min(rows, next_power(tokens))
    tiles = -(-tokens // rows)
    runs = max(1, min(tiles, 8 * processors(device) // programs))
    usual = Tile(rows, 16, min(64, next_power(-(-tiles // runs), 1)), 4 if d <= 64 else 8, 2 if dtype == torch.float32 else 3)
    bounds = {"m": (16, 64), "k": (1, min(64, next_power(tiles, 1))), "warps": (1, 8), "stages": (1, 4)}
    return pick(device, key(f"apply{precision(dtype)}", batch, tokens, width, d), usual, **bounds)


def encode(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, threshold: Tensor | None, heads: int, rule: str, codes: str, v_sum: bool, k_sum: bool, parts: int,
    pdl: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x (B, N, C), weight (E, 3C or 2C, C), threshold (2, h) for rule `given`; v is a view of rows of 3C or 2C."""
    batch, tokens, width = x.shape
    d, outputs, dtype, device = width // heads, weight.shape[1], weight.dtype, x.device
    if codes == "float":
        queries = torch.empty(batch, heads, tokens, d, dtype=dtype, device=device)
    else:
        queries = torch.empty(batch, heads, tokens, -(-d // 32), dtype=torch.int32, device=device)
    context = torch.empty(batch, parts, heads, d, d, dtype=torch.float32, device=device)
    values, keys = (torch.empty((batch, parts, heads, d) if s else (0,), dtype=torch.float32, device=device) for s in (v_sum, k_sum))
    rows, choice = norm_linear(x.flatten(0, 1), norm_weight, norm_bias, eps, weight, bias, router, None, None, "none", pdl)
    rows = rows.view(batch, tokens, outputs)
    v = rows[..., outputs - width :]
    if v.numel() == 0:
        return queries, v, context.zero_(), values.zero_(), choice, keys.zero_()
    tile = context_tile(batch, tokens, width, d, dtype, device)
    flags = {"launch_pdl": True} if pdl else {}
    context_kernel[(batch * parts * heads,)](
        rows, threshold, queries, context, values, keys, tokens, width, outputs, parts, heads,
        SHARED=outputs == 2 * width, RULE=rule, CODES=codes, V_SUM=v_sum, K_SUM=k_sum,
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32", PDL=pdl, D=d, BM=tile.m, STAGES=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return queries, v, context, values, choice, keys


def mix(
    queries: Tensor, v: Tensor, context: Tensor, v_sum: Tensor, k_sum: Tensor, conv: Tensor | None, weight: Tensor,
    bias: Tensor | None, router: Tensor | None, residual: Tensor | None, codes: str, local: str, context_mean: bool, output: str,
    factor: float, prefix: int, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """v (B, N, C) with rows any distance apart, context (B, S, h, d, d), weight (E, C, C), conv (h, window)."""
    merged = apply(queries, v, context, v_sum, k_sum, conv, codes, local, context_mean, output, factor, prefix, pdl)
    residual = residual.flatten(0, 1) if residual is not None else None
    out, choice = norm_linear(merged.flatten(0, 1), None, None, 0.0, weight, bias, router, residual, None, "none", pdl)
    return out.view(v.shape), choice


def apply(
    queries: Tensor, v: Tensor, context: Tensor, v_sum: Tensor, k_sum: Tensor, conv: Tensor | None, codes: str, local: str,
    context_mean: bool, output: str, factor: float, prefix: int, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """What `mix` projects: (B, N, C), heads merged."""
    batch, tokens, width = v.shape
    parts, heads, d = context.shape[1:4]
    out = v.new_empty(v.shape)
    if out.numel() == 0:
        return out
    tile = apply_tile(batch, tokens, width, d, v.dtype, v.device)
    window = 0 if conv is None else conv.shape[1]
    flags = {"launch_pdl": True} if pdl else {}
    apply_kernel[(batch * heads * -(-tokens // (tile.m * tile.k)),)](
        queries, v, context, v_sum, k_sum, conv, out,
        tokens, width, v.stride(1), parts, heads, *_scales(tokens, context_mean, factor), prefix,
        CODES=codes, LOCAL=local, OUTPUT=output, WINDOW=window, PREFIX=prefix > 0,
        PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32", PDL=pdl, D=d, BM=tile.m, TILES=tile.k,
        EDGE=next_power(window // 2, 8), AT_ONCE=min(next_power(parts, 1), max(1, min(16, 4096 // (d * d)))), STAGES=tile.stages,
        num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out


def _scales(tokens: int, context_mean: bool, factor: float) -> tuple[float, float]:
    """Of the context divided by the number of tokens, and ½ of the same for every key."""
    count = 1.0 if context_mean else float(tokens)
    return count * factor / math.pi, 0.5 * count


def parts_for(batch: int, tokens: int, heads: int, device: torch.device) -> int:
    """Into how many parts a picture's tokens are cut: enough programs for the device, whole tiles of 64, and at most 16, because
    every program of the second op reads them all."""
    wanted, tiles = -(-2 * processors(device) // max(batch * heads, 1)), max(1, -(-tokens // 64))
    # As few parts as do not lengthen the longest.
    return -(-tiles // -(-tiles // min(wanted, tiles, 16)))
