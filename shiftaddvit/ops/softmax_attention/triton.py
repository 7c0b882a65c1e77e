"""Softmax attention over heads merged in the channel dimension, so that q, k and v are views of one projection's output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import wait_for_inputs
from ..tiling import next_power


@triton.jit
def softmax_attention_kernel(
    q, k, v, out, N, KEYS, C, heads, q_b, q_n, k_b, k_n, v_b, v_n, scale,
    D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM queries of one head against all keys, BK at a time, with a running maximum and sum. `scale` includes log2(e)."""
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    picture = (pid // (tiles * heads)).to(tl.int64)
    m = (pid % tiles) * BM + tl.arange(0, BM)
    i = head * D + tl.arange(0, D)
    T: tl.constexpr = q.dtype.element_ty
    wait_for_inputs(PDL)
    queries = tl.load(q + picture * q_b + m[:, None] * q_n + i[None, :], mask=(m < N)[:, None], other=0.0)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for first in tl.range(0, KEYS, BK, num_stages=1):
        j = first + tl.arange(0, BK)
        inside = j < KEYS
        keys = tl.load(k + picture * k_b + j[None, :] * k_n + i[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + picture * v_b + j[:, None] * v_n + i[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(weights.to(T), values, acc * shrink[:, None], input_precision=PRECISION)
        largest = new
    y = acc / total[:, None]
    tl.store(out + (picture * N + m)[:, None] * C + i[None, :], y.to(T), mask=(m < N)[:, None])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, pdl: bool = False) -> Tensor:
    """q (B, N, C), k and v (B, keys, C), each with unit stride along C."""
    batch, n, width = q.shape
    out = torch.empty(batch, n, width, dtype=q.dtype, device=q.device)
    if out.numel():
        d = width // heads
        rows, keys = min(64, next_power(n)), min(64, next_power(k.shape[1]))
        flags = {"launch_pdl": True} if pdl else {}
        softmax_attention_kernel[(batch * heads * triton.cdiv(n, rows),)](
            q, k, v, out, n, k.shape[1], width, heads, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            d**-0.5 * 1.4426950408889634, D=d, BM=rows, BK=keys, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", PDL=pdl,
            num_warps=4, **flags,
        )  # fmt: skip
    return out
