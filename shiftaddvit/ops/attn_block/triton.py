"""Launches: contexts of parts of every picture, then everything else."""

import math

import torch
from torch import Tensor

from ..tiling import Tile, key, pick, processors
from .apply import attn_apply_kernel
from .context import attn_context_kernel

WARPS = 4
"""Of a program: they share weights in shared memory, and nothing else."""
MOST_PARTS = 16
"""Every program of the second kernel adds up the contexts of all parts of its picture."""


def runs_of(tokens: int, tile: Tile, most_parts: int | None = None) -> tuple[int, int]:
    """Into how many programs to cut a picture, and how many steps of `tile.m` tokens each takes, at most `tile.k` unless the programs
    would be too many."""
    steps = -(-tokens // tile.m)
    programs = min(-(-steps // tile.k), most_parts or steps)
    length = -(-steps // programs)
    return -(-steps // length), length


def attn_tile(kernel: str, pictures: int, tokens: int, channels: int, experts: int, device: torch.device) -> Tile:
    """`m` tokens a step of a program, 16 or 32 a warp; `k` steps at most; with `stages` = 2 products of the second kernel are those of four
    warps together, where that can be, with 1 those of each warp. `n` is not used."""
    # As many as registers allow on a multiprocessor.
    at_once = {("context", 32): 4, ("apply", 32): 5, ("apply", 64): 3}.get((kernel, channels), 2) * processors(device)

    def cost(longest: int) -> float:
        """Of the busiest multiprocessor; starting a run costs about two steps."""
        programs, steps = runs_of(tokens, Tile(16 * WARPS, 32, longest, WARPS), MOST_PARTS if kernel == "context" else None)
        return -(-pictures * programs // at_once) * (steps + 2)

    usual = Tile(16 * WARPS, 32, min((64, 32, 16, 8, 4, 2, 1), key=cost), WARPS)
    problem = key(f"attn_{kernel}{experts}", pictures, tokens, channels)
    # More tokens at a time of 64 channels would spill.
    most = 32 * WARPS if channels == 32 else 16 * WARPS
    return pick(device, problem, usual, m=(16 * WARPS, most), k=(1, 64), stages=(1, 2 if kernel == "apply" else 1))


def scales(tokens: int, context_mean: bool) -> tuple[float, float, float]:
    """What to multiply sums of contexts by, values by (½), and both afterwards by, a power of two that keeps the first in float16's range."""
    scale = (1.0 if context_mean else float(tokens)) / math.pi
    post = 2.0 ** max(0, math.ceil(math.log2(scale)))
    return scale / post / tokens, 0.5 / post, post


def attn_block(
    x: Tensor, eps: float, gamma: Tensor, beta: Tensor, weight1: Tensor, bias1: Tensor, router1: Tensor | None, conv: Tensor | None,
    weight2: Tensor, bias2: Tensor, router2: Tensor | None, heads: int, rule: str, codes: str, local: str, context_mean: bool,
    output_unit: bool, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, N, C), weight1 (E, 3C or 2C, C), conv (h, window) in float32, weight2 (E, C, C), routers (16, C)."""
    pictures, tokens, channels = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    outputs, experts = weight1.shape[1], (len(weight1), len(weight2))
    form = dict(HEADS=heads, OUT=outputs, ZERO=rule == "zero", SIGNED=codes == "plus-minus", C=channels, PDL=pdl, WARPS=WARPS, num_warps=WARPS)
    form |= {"launch_pdl": True} if pdl else {}
    tile = attn_tile("context", pictures, tokens, channels, experts[0], x.device)
    parts, steps = runs_of(tokens, tile, MOST_PARTS)
    context = torch.empty(pictures, parts, heads, 32, 32, dtype=torch.float32, device=x.device)
    attn_context_kernel[(pictures * parts,)](
        x, gamma, beta, weight1, bias1, router1, context, tokens, steps, parts, eps,
        E=experts[0], KEYS=outputs - 2 * channels, T=tile.m // (16 * WARPS), **form,
    )  # fmt: skip
    tile = attn_tile("apply", pictures, tokens, channels, 10 * experts[0] + experts[1], x.device)
    programs, steps = runs_of(tokens, tile)
    attn_apply_kernel[(pictures * programs,)](
        x, gamma, beta, weight1, bias1, router1, context, conv, weight2, bias2, router2, out, tokens, steps, programs, parts, eps,
        *scales(tokens, context_mean), E1=experts[0], E2=experts[1], LOCAL=local == "own", UNIT=output_unit,
        WINDOW=0 if conv is None else conv.shape[1], T=tile.m // (16 * WARPS), GROUP=tile.stages > 1, **form,
    )  # fmt: skip
    return out
