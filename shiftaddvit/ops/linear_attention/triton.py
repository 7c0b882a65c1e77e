"""Launches of the two linear-attention kernels."""

import math

import torch
import triton.language as tl
from torch import Tensor

from ..tiling import Tile, fill, key, next_power, pick, precision, processors
from .kernels import encode_kernel, mix_kernel

_ELEMENT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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


def encode(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, threshold: Tensor | None, heads: int, rule: str, codes: str, v_sum: bool, k_sum: bool, parts: int,
    pdl: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x (B, N, C), weight (E, 3C or 2C, C), threshold (2, h) for rule `given`."""
    batch, tokens, width = x.shape
    d, experts = width // heads, weight.shape[0]
    device = x.device
    if codes == "float":
        queries = torch.empty(batch, heads, tokens, d, dtype=x.dtype, device=device)
    else:
        queries = torch.empty(batch, heads, tokens, -(-d // 32), dtype=torch.int32, device=device)
    v = torch.empty(batch, tokens, width, dtype=x.dtype, device=device)
    context = torch.empty(batch, parts, heads, d, d, dtype=torch.float32, device=device)
    values, keys = (torch.empty((batch, parts, heads, d) if s else (0,), dtype=torch.float32, device=device) for s in (v_sum, k_sum))
    choice = torch.empty(batch * tokens if experts == 2 else 0, dtype=torch.int8, device=device)
    if v.numel() == 0:
        return queries, v, context.zero_(), values.zero_(), choice, keys.zero_()
    tile = encode_tile(batch, tokens, width, d, experts, x.dtype, device)
    flags = {"launch_pdl": True} if pdl else {}
    encode_kernel[(batch * parts * heads,)](
        x, norm_weight, norm_bias, weight, bias, router, threshold, queries, v, context, values, keys, choice,
        tokens, width, weight.shape[1], x.stride(1), eps, parts, heads,
        NORM=norm_weight is not None, EXPERTS=experts, HAS_BIAS=bias is not None, SHARED=weight.shape[1] == 2 * width, RULE=rule,
        CODES=codes, V_SUM=v_sum, K_SUM=k_sum, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        WHOLE=width <= tile.k, D=d, BM=tile.m, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return queries, v, context, values, choice, keys


def mix(
    queries: Tensor, v: Tensor, context: Tensor, v_sum: Tensor, k_sum: Tensor, conv: Tensor | None, weight: Tensor,
    bias: Tensor | None, router: Tensor | None, residual: Tensor | None, codes: str, local: str, context_mean: bool, output: str,
    factor: float, prefix: int, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """v (B, N, C), context (B, S, h, d, d), weight (E, C, C), conv (h, window)."""
    batch, tokens, width = v.shape
    experts, (parts, heads, d) = weight.shape[0], context.shape[1:4]
    out = torch.empty_like(v)
    choice = torch.empty(batch * tokens if experts == 2 else 0, dtype=torch.int8, device=v.device)
    if out.numel() == 0:
        return out, choice
    tile = mix_tile(batch, tokens, width, d, experts, v.dtype, v.device)
    flags = {"launch_pdl": True} if pdl else {}
    mix_kernel[(batch * -(-tokens // tile.m) * -(-width // tile.n),)](
        queries, v, context, v_sum, k_sum, conv, weight, bias, router, residual, out, choice,
        tokens, width, parts, heads, (1.0 if context_mean else float(tokens)) * factor / math.pi, 0.5 * (1.0 if context_mean else tokens), prefix,
        EXPERTS=experts, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, CODES=codes, LOCAL=local, OUTPUT=output,
        WINDOW=0 if conv is None else conv.shape[1], PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32", PDL=pdl,
        T=_ELEMENT[v.dtype], D=d, BM=tile.m, BN=tile.n, AT_ONCE=tile.k, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out, choice


def parts_for(batch: int, tokens: int, heads: int, device: torch.device) -> int:
    """Into how many parts a picture's tokens are cut: enough programs for the device, whole tiles of 64, and at most 32, because
    the second kernel reads them all."""
    wanted = -(-2 * processors(device) // max(batch * heads, 1))
    return max(1, min(wanted, -(-tokens // 64), 32))
