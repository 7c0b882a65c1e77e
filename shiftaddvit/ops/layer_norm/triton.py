"""LayerNorm of rows, and of rows averaged over a picture."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import normalised_rows, wait_for_inputs
from ..tiling import next_power


@triton.jit
def layer_norm_kernel(
    x, gamma, beta, out, N, C, x_b, x_n, eps, MEAN: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BM tokens of one picture, or with MEAN all of them, BM at a time."""
    tiles = 1 if MEAN else tl.cdiv(N, BM)
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    first = 0 if MEAN else (tl.program_id(0) % tiles) * BM
    last = N if MEAN else first + BM
    cs = tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    scale = tl.load(gamma + cs, mask=cs < C, other=0.0).to(tl.float32)
    shift = tl.load(beta + cs, mask=cs < C, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    for start in tl.range(first, last, BM, num_stages=1):
        m = start + tl.arange(0, BM)
        inside = (m < N)[:, None] & (cs < C)[None, :]
        a = tl.load(x + picture * x_b + m[:, None].to(tl.int64) * x_n + cs[None, :], mask=inside, other=0.0).to(tl.float32)
        a = normalised_rows(a, inside, C, eps)
        if MEAN:
            total += tl.sum(a, 0)
        else:
            y = a * scale[None, :] + shift[None, :]
            tl.store(out + (picture * N + m[:, None]) * C + cs[None, :], y.to(out.dtype.element_ty), mask=inside)
    if MEAN:
        # Scale and shift are the same for every token, so they follow the mean.
        tl.store(out + picture * C + cs, total / N * scale + shift, mask=cs < C)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: bool, pdl: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """x (B, N, C) with unit stride along C; the result in `dtype`, by default x's, a mean in float32."""
    batch, n, c = x.shape
    out = torch.empty((batch, c) if mean else (batch, n, c), dtype=torch.float32 if mean else dtype or x.dtype, device=x.device)
    if out.numel():
        wide = next_power(c)
        # About 32 values a thread at four warps; a mean has the picture's tokens to itself.
        rows = min(next_power(n, 1), max(1, (8192 if mean else 4096) // wide))
        flags = {"launch_pdl": True} if pdl else {}
        layer_norm_kernel[(batch * (1 if mean else triton.cdiv(n, rows)),)](
            x, weight, bias, out, n, c, x.stride(0), x.stride(1), eps, MEAN=mean, PDL=pdl, BM=rows, BC=wide,
            num_warps=8 if mean else 4, **flags,
        )  # fmt: skip
    return out
