"""Launches: of the whole MLP, or of all but fc2 and of fc2."""

import torch
from torch import Tensor

from ..norm_linear.triton import norm_linear
from ..tiling import Tile, key, pick, processors
from .hidden import conv_hidden_kernel
from .kernels import conv_mlp_kernel

WARPS = 8
"""Each has 32 of a program's 256 hidden channels: filters, weights and two rows of sums of more would not fit its registers."""


def lanes_for(width: int) -> tuple[int, int]:
    """How many of eight lanes share a row of a picture, and how many columns each of them has."""
    lanes = next(lanes for lanes in (1, 2, 4, 8) if -(-width // lanes) <= 8)
    return lanes, -(-width // lanes)


def strips_of(height: int, tallest: int) -> tuple[int, int]:
    """Into how many strips of at most `tallest` rows to cut a picture, and their height, which is even."""
    bands = -(-height // tallest)
    rows = -(-height // bands)
    rows += rows % 2
    return -(-height // rows), rows


def mlp_tile(pictures: int, height: int, width: int, hidden: int, experts: tuple[int, int], device: torch.device) -> Tile:
    """`k` rows of a strip at most; with `stages` = 2 fc2's products run beside the convolution, with 1 before it."""
    name = f"conv_mlp{experts[0]}{experts[1]}" if hidden == 32 * WARPS else f"conv_hidden{experts[0]}"
    problem = key(name, pictures * height * width, width, hidden)
    together, count = 8 // lanes_for(width)[0], processors(device)

    def steps(tallest: int) -> float:
        """Of the busiest multiprocessor; starting a strip costs about two."""
        bands, rows = strips_of(height, tallest)
        programs = -(-pictures // together) * bands * (hidden // (32 * WARPS))
        return -(-programs // count) * (rows // 2 + 3)

    usual = Tile(64, hidden, min((64, 32, 16, 8, 4, 2), key=steps), WARPS, 2)
    bounds = {"k": (2, 64)} | ({"stages": (1, 2)} if hidden == 32 * WARPS else {})
    return pick(device, problem, usual, **bounds)


def conv_mlp(
    x: Tensor, height: int, width: int, eps: float, gamma: Tensor, beta: Tensor, weight1: Tensor, bias1: Tensor, router1: Tensor | None,
    conv: Tensor, conv_bias: Tensor, weight2: Tensor, bias2: Tensor, router2: Tensor | None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, height · width, C), weight1 (E, hidden, C), conv (9, hidden), weight2 (E, C, hidden), routers (16, inputs)."""
    pictures, _, channels = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    experts = len(weight1), len(weight2)
    tile = mlp_tile(pictures, height, width, conv.shape[1], experts, x.device)
    lanes, columns = lanes_for(width)
    bands, rows = strips_of(height, tile.k)
    flags = {"launch_pdl": True} if pdl else {}
    programs = -(-pictures // (8 // lanes)) * bands
    if conv.shape[1] > 32 * WARPS:
        hidden = torch.empty(pictures * height * width, conv.shape[1], dtype=conv.dtype, device=x.device)
        conv_hidden_kernel[(programs * (conv.shape[1] // (32 * WARPS)),)](
            x, gamma, beta, weight1, bias1, router1, conv, conv_bias, hidden, height, width, bands, pictures, eps, E1=experts[0], COLUMNS=columns,
            LANES=lanes, ROWS=rows, C=channels, F=conv.shape[1], PDL=pdl, WARPS=WARPS, num_warps=WARPS, **flags,
        )  # fmt: skip
        rows = x.reshape(-1, channels)
        return norm_linear(hidden, None, None, 0.0, weight2, bias2, router2, rows, None, "none", pdl)[0].reshape(x.shape)
    conv_mlp_kernel[(programs,)](
        x, gamma, beta, weight1, bias1, router1, conv, conv_bias, weight2, bias2, router2, out, height, width, bands, pictures, eps,
        E1=experts[0], E2=experts[1], COLUMNS=columns, LANES=lanes, ROWS=rows, C=channels, F=conv.shape[1], LATE=tile.stages > 1, PDL=pdl,
        WARPS=WARPS, num_warps=WARPS, **flags,
    )  # fmt: skip
    return out
