"""One ray a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_columns, normalised_rows


@triton.jit
def ray_color_kernel(x, gamma, beta, weight, bias, out, S, eps, C: tl.constexpr, BM: tl.constexpr):
    ray = tl.program_id(0).to(tl.int64)
    cs = tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for start in tl.range(0, S, BM, num_stages=2):
        s = start + tl.arange(0, BM)
        inside = (s < S)[:, None] & (cs < C)[None, :]
        rows = tl.load(x + (ray * S + s)[:, None] * C + cs[None, :], mask=inside, other=0.0).to(tl.float32)
        # Rows outside are all zero and stay so.
        total += tl.sum(normalised_rows(rows, inside, C, eps), 0)
    mean = total / S * tl.load(gamma + cs).to(tl.float32) + tl.load(beta + cs).to(tl.float32)
    for color in tl.static_range(3):
        tl.store(out + ray * 3 + color, tl.sum(mean * tl.load(weight + color * C + cs), 0) + tl.load(bias + color))


@triton.jit
def _coded(x, CODES: tl.constexpr, LOW: tl.constexpr, D: tl.constexpr):
    """(rows, heads, D) as codes."""
    if CODES == "softmax":
        return x * (1.0 / D) ** 0.25
    if CODES == "float":
        return x * tl.rsqrt(tl.sum(x * x, 2) + 1e-12)[:, :, None]
    if CODES == "token":
        return tl.where(x > (tl.sum(x, 2) / D)[:, :, None], 1.0, LOW)
    return tl.where(x > 0, 1.0, LOW)


@triton.jit
def ray_scores_kernel(
    x, gamma, beta, query, key, out, S, eps,
    C: tl.constexpr, HEADS: tl.constexpr, CODES: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    D: tl.constexpr = C // HEADS
    ray = tl.program_id(0).to(tl.int64)
    cs, hs = tl.arange(0, C), tl.arange(0, HEADS)
    scale, shift = tl.load(gamma + cs).to(tl.float32)[None, :], tl.load(beta + cs).to(tl.float32)[None, :]
    # The first point, repeated to the height that matrix units take; every row is the same query.
    every = (tl.arange(0, 16) < 16)[:, None] & (cs < C)[None, :]
    first = tl.load(x + ray * S * C + tl.arange(0, 16)[:, None] * 0 + cs[None, :]).to(tl.float32)
    first = (normalised_rows(first, every, C, eps) * scale + shift).to(T)
    q = tl.dot(first, load_columns(query, cs, 0, C, C, C, T), input_precision=PRECISION)
    q = tl.sum(tl.where((tl.arange(0, 16) == 0)[:, None], q, 0.0), 0)
    q = _coded(tl.reshape(q, (1, HEADS, D)), CODES, LOW, D)
    for start in tl.range(0, S, BM, num_stages=1):
        s = start + tl.arange(0, BM)
        inside = (s < S)[:, None] & (cs < C)[None, :]
        rows = tl.load(x + (ray * S + s)[:, None] * C + cs[None, :], mask=inside, other=0.0).to(tl.float32)
        a = (normalised_rows(rows, inside, C, eps) * scale + shift).to(T)
        k = tl.dot(a, load_columns(key, cs, 0, C, C, C, T), input_precision=PRECISION)
        scores = tl.sum(_coded(tl.reshape(k, (BM, HEADS, D)), CODES, LOW, D) * q, 2)
        tl.store(out + (ray * S + s)[:, None] * HEADS + hs[None, :], scores, mask=(s < S)[:, None])


def ray_color(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """x (R, S, C), contiguous."""
    rays, samples, c = x.shape
    out = torch.empty(rays, 3, dtype=torch.float32, device=x.device)
    if x.numel():
        ray_color_kernel[(rays,)](x, norm_weight, norm_bias, weight, bias, out, samples, eps, C=c, BM=64, num_warps=4)
    return out


def ray_scores(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, query: Tensor, key: Tensor, heads: int, codes: str, low: float
) -> Tensor:
    """x (R, S, C), contiguous; heads a power of two."""
    rays, samples, c = x.shape
    out = torch.empty(rays, samples, heads, dtype=torch.float32, device=x.device)
    if x.numel():
        ray_scores_kernel[(rays,)](
            x, norm_weight, norm_bias, query, key, out, samples, eps,
            C=c, HEADS=heads, CODES=codes, LOW=low, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", BM=64, num_warps=4,
        )  # fmt: skip
    return out
