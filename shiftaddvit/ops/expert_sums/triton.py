"""Importance and load of two experts on the GPU: one reading of the logits forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Tokens of one program."""


@triton.jit
def load_pairs(x, first, M, BLOCK: tl.constexpr):
    """Both columns of BLOCK rows of x (M, 2) from row `first`, zero beyond the last, read as one contiguous piece."""
    here = tl.arange(0, 2 * BLOCK)
    return tl.split(tl.reshape(tl.load(x + first * 2 + here, mask=here < (M - first) * 2, other=0.0), (BLOCK, 2)))


@triton.jit
def store_pairs(x, first, M, a, b, BLOCK: tl.constexpr):
    here = tl.arange(0, 2 * BLOCK)
    tl.store(x + first * 2 + here, tl.reshape(tl.join(a, b), (2 * BLOCK,)), mask=here < (M - first) * 2)


@triton.jit
def softmax_pair(l0, l1):
    top = tl.maximum(l0, l1)
    e0, e1 = tl.exp(l0 - top), tl.exp(l1 - top)
    total = e0 + e1
    return e0 / total, e1 / total


@triton.jit
def normal_below(x):
    """Φ(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def expert_sums_kernel(logits, clean, out, M, BLOCK: tl.constexpr):
    """out[program] (2, 2): importance and load of the program's tokens."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK) < M - first
    l0, l1 = load_pairs(logits, first, M, BLOCK)
    c0, c1 = load_pairs(clean, first, M, BLOCK)
    p0, p1 = softmax_pair(l0, l1)
    out += tl.program_id(0).to(tl.int64) * 4
    tl.store(out, tl.sum(tl.where(inside, p0, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(inside, p1, 0.0), 0))
    tl.store(out + 2, tl.sum(tl.where(inside, normal_below((c0 - l1) * 2), 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(inside, normal_below((c1 - l0) * 2), 0.0), 0))


@triton.jit
def gradients_kernel(logits, clean, grad, to_logits, to_clean, M, BLOCK: tl.constexpr):
    """From grad (2, 2) of the sums to the gradients of both inputs."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    l0, l1 = load_pairs(logits, first, M, BLOCK)
    c0, c1 = load_pairs(clean, first, M, BLOCK)
    p0, p1 = softmax_pair(l0, l1)
    importance = p0 * p1 * (tl.load(grad) - tl.load(grad + 1))
    load0 = tl.load(grad + 2) * 2 * normal_density((c0 - l1) * 2)
    load1 = tl.load(grad + 3) * 2 * normal_density((c1 - l0) * 2)
    store_pairs(to_logits, first, M, importance - load1, -importance - load0, BLOCK)
    store_pairs(to_clean, first, M, load0, load1, BLOCK)


def expert_sums(logits: Tensor, clean: Tensor) -> Tensor:
    """Contiguous logits and clean (M, 2) → (2, 2). Programs write their own sums, which are added in a fixed order."""
    rows = logits.shape[0]
    programs = triton.cdiv(rows, BLOCK)
    parts = torch.empty(programs, 2, 2, dtype=torch.float32, device=logits.device)
    if rows:
        expert_sums_kernel[(programs,)](logits, clean, parts, rows, BLOCK=BLOCK, num_warps=4)
    return parts.sum(0)


def gradients(logits: Tensor, clean: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous grad (2, 2) of the sums → the gradients of logits and clean."""
    to_logits, to_clean = torch.empty_like(logits), torch.empty_like(clean)
    rows = logits.shape[0]
    if rows:
        gradients_kernel[(triton.cdiv(rows, BLOCK),)](logits, clean, grad, to_logits, to_clean, rows, BLOCK=BLOCK, num_warps=4)
    return to_logits, to_clean
