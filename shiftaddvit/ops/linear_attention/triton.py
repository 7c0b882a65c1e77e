"""Launches of linear attention, in one of two forms.

`fused` is one kernel an op: every head's program reads the tokens again, and nothing but v and the codes is written. `split` makes the
two projections launches of `norm_linear`, and puts a small kernel behind the first and before the second.
"""

import math
from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

from ..fused_mlp.reference import route_rows
from ..fused_mlp.triton import norm_linear
from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .kernels import encode_kernel, mix_kernel
from .split_kernels import apply_kernel, context_kernel

Form = Literal["split", "fused"]

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def form_for(batch: int, tokens: int, width: int, heads: int, experts: int, dtype: torch.dtype) -> Form:
    """Which form both ops run in. The forms agree to within rounding: `split` rounds q, k and the heads' outputs to the dtype of x, so that
    a channel within that rounding of its threshold may get the other code. A picture's result depends on the batch in no other way."""
    return "split"


def encode_tile(batch: int, tokens: int, width: int, d: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tokens of a tile and channels of a step; `n` is not used."""
    rows = 64 if tokens > 32 else next_power(tokens)
    if width <= 64 and (d <= 32 or experts == 1):
        # Weights stay in registers over the tiles. Those of two experts of 64 channels leave too few to four warps; eight in one program
        # are as many on a multiprocessor as four in each of two.
        usual = Tile(rows, 16, next_power(width), 4 if d <= 32 and experts * width <= 64 else 8, 2)
    else:
        usual = Tile(rows, 16, 64 if d <= 32 and experts == 1 else 32, 8)
    bounds = {"m": (16, 128), "k": (32, min(128, next_power(width))), "warps": (4, 8), "stages": (1, 4)}
    return pick(device, key(f"encode{experts}{precision(dtype)}", batch, tokens, width, d), usual, **bounds)


def mix_tile(batch: int, tokens: int, width: int, d: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """`k` is how many parts of the context are summed at once."""
    # Heads of 64 and more need registers for their context: half the rows.
    rows = 64 if d <= 32 else 32
    start = Tile(min(rows, next_power(tokens)), min(128, next_power(width)), 1)
    tile = fill(start, batch * tokens, width, device)
    warps = 4 if tile.n == 32 and tile.m > 16 and d <= 32 else 8
    # On the lowest tile the compiler aims at several programs a multiprocessor, and with other numbers spills a few registers for it.
    together = 128 // (d * experts) if tile.m <= 16 and d >= 32 else 4096 // (d * d)
    usual = Tile(tile.m, tile.n, max(1, min(16, together)), warps)
    bounds = {"m": (16, 128), "n": (32, min(256, next_power(width))), "k": (1, 16), "warps": (4, 8)}
    return pick(device, key(f"mix{experts}{precision(dtype)}", batch, tokens, width, d), usual, **bounds)


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
    usual = Tile(rows, 16, min(64, next_power(-(-tiles // runs), 1)), 4 if d <= 64 else 8, 2)
    bounds = {"m": (16, 64), "k": (1, min(64, next_power(tiles, 1))), "warps": (1, 8), "stages": (1, 4)}
    return pick(device, key(f"apply{precision(dtype)}", batch, tokens, width, d), usual, **bounds)


def encode(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, threshold: Tensor | None, heads: int, rule: str, codes: str, v_sum: bool, k_sum: bool, parts: int,
    pdl: bool = False, form: Form | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x (B, N, C), weight (E, 3C or 2C, C), threshold (2, h) for rule `given`; v is a view of rows of 3C or 2C."""
    batch, tokens, width = x.shape
    d, (experts, outputs, _) = width // heads, weight.shape
    device = x.device
    if codes == "float":
        queries = torch.empty(batch, heads, tokens, d, dtype=x.dtype, device=device)
    else:
        queries = torch.empty(batch, heads, tokens, -(-d // 32), dtype=torch.int32, device=device)
    context = torch.empty(batch, parts, heads, d, d, dtype=torch.float32, device=device)
    values, keys = (torch.empty((batch, parts, heads, d) if s else (0,), dtype=torch.float32, device=device) for s in (v_sum, k_sum))
    split = (form or form_for(batch, tokens, width, heads, experts, x.dtype)) == "split"
    if split:
        rows, choice = norm_linear(x.flatten(0, 1), norm_weight, norm_bias, eps, weight, bias, router, None, None, "none", pdl)
        rows = rows.view(batch, tokens, outputs)
    else:
        rows = torch.empty(batch, tokens, outputs, dtype=x.dtype, device=device)
        choice = torch.empty(batch * tokens if experts == 2 else 0, dtype=torch.int8, device=device)
    v = rows[..., outputs - width :]
    if v.numel() == 0:
        return queries, v, context.zero_(), values.zero_(), choice, keys.zero_()
    flags = {"launch_pdl": True} if pdl else {}
    same = dict(
        SHARED=outputs == 2 * width, RULE=rule, CODES=codes, V_SUM=v_sum, K_SUM=k_sum,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", PDL=pdl, D=d, **flags,
    )  # fmt: skip
    grid = (batch * parts * heads,)
    if split:
        tile = context_tile(batch, tokens, width, d, x.dtype, device)
        context_kernel[grid](
            rows, threshold, queries, context, values, keys, tokens, width, outputs, parts, heads,
            BM=tile.m, STAGES=tile.stages, num_warps=tile.warps, **same,
        )  # fmt: skip
        return queries, v, context, values, choice, keys
    router = route_rows(router, weight.dtype) if router is not None else None
    tile = encode_tile(batch, tokens, width, d, experts, x.dtype, device)
    encode_kernel[grid](
        x, norm_weight, norm_bias, weight, bias, router, threshold, queries, v, context, values, keys, choice,
        tokens, width, outputs, x.stride(1), outputs, eps, parts, heads,
        NORM=norm_weight is not None, EXPERTS=experts, HAS_BIAS=bias is not None,
        WHOLE=width <= tile.k, BM=tile.m, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **same,
    )  # fmt: skip
    return queries, v, context, values, choice, keys


def mix(
    queries: Tensor, v: Tensor, context: Tensor, v_sum: Tensor, k_sum: Tensor, conv: Tensor | None, weight: Tensor,
    bias: Tensor | None, router: Tensor | None, residual: Tensor | None, codes: str, local: str, context_mean: bool, output: str,
    factor: float, prefix: int, pdl: bool = False, form: Form | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """v (B, N, C) with rows any distance apart, context (B, S, h, d, d), weight (E, C, C), conv (h, window)."""
    batch, tokens, width = v.shape
    experts, heads = weight.shape[0], context.shape[2]
    if (form or form_for(batch, tokens, width, heads, experts, v.dtype)) == "split":
        merged = apply(queries, v, context, v_sum, k_sum, conv, codes, local, context_mean, output, factor, prefix, pdl)
        residual = residual.flatten(0, 1) if residual is not None else None
        out, choice = norm_linear(merged.flatten(0, 1), None, None, 0.0, weight, bias, router, residual, None, "none", pdl)
        return out.view(batch, tokens, width), choice
    parts, d = context.shape[1], context.shape[3]
    out = v.new_empty(v.shape)
    choice = torch.empty(batch * tokens if experts == 2 else 0, dtype=torch.int8, device=v.device)
    if out.numel() == 0:
        return out, choice
    router = route_rows(router, weight.dtype) if router is not None else None
    tile = mix_tile(batch, tokens, width, d, experts, v.dtype, v.device)
    flags = {"launch_pdl": True} if pdl else {}
    mix_kernel[(batch * -(-tokens // tile.m) * -(-width // tile.n),)](
        queries, v, context, v_sum, k_sum, conv, weight, bias, router, residual, out, choice,
        tokens, width, v.stride(1), parts, heads, *_scales(tokens, context_mean, factor), prefix,
        EXPERTS=experts, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, CODES=codes, LOCAL=local, OUTPUT=output,
        WINDOW=0 if conv is None else conv.shape[1], PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32", PDL=pdl,
        T=_ELEMENT[v.dtype], D=d, BM=tile.m, BN=tile.n, AT_ONCE=tile.k, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out, choice


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
