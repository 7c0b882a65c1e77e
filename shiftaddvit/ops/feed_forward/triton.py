"""Launch of the feed-forward kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import Tile, key, pick
from .kernels import with_feed_forward


@triton.jit
def feed_forward_kernel(
    x, gamma, beta, w1, b1, w2, b2, router1, router2, out, M, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND are the experts of the two linears."""
    T: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    cs = tl.arange(0, C)
    rows = m[:, None].to(tl.int64) * C + cs[None, :]
    inside = (m < M)[:, None] & (cs < C)[None, :]
    y = tl.load(x + rows, mask=inside, other=0.0).to(tl.float32)
    y = with_feed_forward(y, inside, gamma, beta, eps, w1, b1, w2, b2, router1, router2, C, HIDDEN, FIRST, SECOND, PRECISION, BM, BH, STAGES, T)
    tl.store(out + rows, y.to(T), mask=inside)


def feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    router1: Tensor | None, router2: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """x (M, C), weights (E, out, in), biases (E, out)."""
    (m, c), out = x.shape, torch.empty_like(x)
    if m:
        half = x.dtype != torch.float32
        experts = f"{weight1.shape[0]}{weight2.shape[0]}"
        tile = Tile(128, c, 64, 8, 2) if half and c <= 64 else Tile(32, c, 64, 4, 2 if half else 1)
        if half:
            tile = pick(x.device, key(f"feed_forward{experts}", c, weight1.shape[1]), tile, m=(32, 128), k=(32, 128), warps=(4, 8), stages=(1, 3))
        feed_forward_kernel[(triton.cdiv(m, tile.m),)](
            x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, router1, router2, out, m, eps,
            C=c, HIDDEN=weight1.shape[1], FIRST=weight1.shape[0], SECOND=weight2.shape[0],
            PRECISION="tf32" if half else "tf32x3", BM=tile.m, BH=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out
