"""MatAdd on the GPU: codes stay bits in memory, become matrix-unit operands in registers, and every byte of v is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import next_power, processors

LARGEST = 16384
"""Bytes of one operand's tile: three stages of two operands, and float32 once more as its parts, fit the shared memory."""


@triton.jit
def _expand(word, place, used, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where(used, tl.where(((word >> place) & 1) != 0, HIGH, LOW), 0.0)


@triton.jit
def key_value_kernel(
    words, values, out, N, heads, parts, per_part, d, stride_b, stride_h, stride_n,
    R: tl.constexpr, RP: tl.constexpr, WORDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
    DP: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[part, picture, head] = Σ_j code_jᵀ v_j over the part's tokens, (R, d) in float32 or, for a single part, the dtype of out."""
    pid = tl.program_id(0)
    part = pid % parts
    row = pid // parts
    T: tl.constexpr = values.dtype.element_ty
    r = tl.arange(0, RP)
    c = tl.arange(0, DP)
    base = values + (row // heads).to(tl.int64) * stride_b + (row % heads).to(tl.int64) * stride_h
    bits = words + row.to(tl.int64) * N * WORDS
    acc = tl.zeros((RP, DP), tl.float32)
    end = tl.minimum(N, part * per_part + per_part)
    for t in tl.range(part * per_part, end, BT, num_stages=STAGES):
        j = t + tl.arange(0, BT)
        if WORDS == 1:
            word = tl.load(bits + j, mask=j < end, other=0)[None, :]
        else:
            word = tl.load(bits + j[None, :] * WORDS + (r // 32)[:, None], mask=(j < end)[None, :] & (r < R)[:, None], other=0)
        code = _expand(word, (r % 32)[:, None], (j < end)[None, :] & (r < R)[:, None], LOW, HIGH).to(T)
        v = tl.load(base + j[:, None].to(tl.int64) * stride_n + c[None, :], mask=(j < end)[:, None] & (c < d)[None, :], other=0.0)
        acc = tl.dot(code, v, acc, input_precision=PRECISION)
    where = out + (part * (tl.num_programs(0) // parts) + row).to(tl.int64) * R * d + r[:, None] * d + c[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(r < R)[:, None] & (c < d)[None, :])


@triton.jit
def query_context_kernel(
    words, context, out, N, d,
    R: tl.constexpr, RP: tl.constexpr, WORDS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
    DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out[row, j] = code_j · context[row] for BT tokens of one picture's head."""
    tiles = tl.cdiv(N, BT)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    r = tl.arange(0, RP)
    c = tl.arange(0, DP)
    T: tl.constexpr = context.dtype.element_ty
    sums = tl.load(context + row * R * d + r[:, None] * d + c[None, :], mask=(r < R)[:, None] & (c < d)[None, :], other=0.0)
    bits = words + row * N * WORDS
    if WORDS == 1:
        word = tl.load(bits + j, mask=j < N, other=0)[:, None]
    else:
        word = tl.load(bits + j[:, None] * WORDS + (r // 32)[None, :], mask=(j < N)[:, None] & (r < R)[None, :], other=0)
    code = _expand(word, (r % 32)[None, :], (j < N)[:, None] & (r < R)[None, :], LOW, HIGH).to(T)
    y = tl.dot(code, sums, input_precision=PRECISION)
    tl.store(out + (row * N + j)[:, None] * d + c[None, :], y.to(T), mask=(j < N)[:, None] & (c < d)[None, :])


@triton.jit
def pack_kernel(codes, words, rows, middle, R: tl.constexpr, WORDS: tl.constexpr, BT: tl.constexpr):
    """Bit i of a row is codes[row, i] > middle."""
    j = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.arange(0, 32)
    for word in tl.static_range(WORDS):
        column = word * 32 + i
        x = tl.load(codes + j[:, None] * R + column[None, :], mask=(j < rows)[:, None] & (column < R)[None, :], other=0.0)
        bit = ((x > middle) & (column < R)[None, :]).to(tl.int32) << i[None, :]
        tl.store(words + j * WORDS + word, tl.sum(bit, 1).to(tl.int32), mask=j < rows)


def pack(codes: Tensor, middle: float) -> Tensor:
    """codes (B, h, N, r) of any float dtype → int32 (B, h, N, ⌈r/32⌉)."""
    codes = codes.contiguous()
    r = codes.shape[-1]
    count = -(-r // 32)
    words = torch.empty(*codes.shape[:-1], count, dtype=torch.int32, device=codes.device)
    rows = codes.numel() // max(r, 1)
    if rows:
        pack_kernel[(triton.cdiv(rows, 128),)](codes, words, rows, middle, R=r, WORDS=count, BT=128)
    return words


def key_value(words: Tensor, values: Tensor, r: int, low: float, high: float) -> Tensor:
    """values (B, h, N, d) with unit stride along d."""
    batch, heads, n, d = values.shape
    rows = batch * heads
    # One program a head sums all its tokens in one launch; only few heads of many tokens are worth a second pass over parts.
    parts = max(1, min(processors(values.device) // max(rows, 1), n // 8192))
    block = max(16, min(256 if values.dtype != torch.float32 else 128, LARGEST // (values.element_size() * max(next_power(r), next_power(d)))))
    per_part = triton.cdiv(triton.cdiv(n, parts), block) * block
    wide = torch.float32 if parts > 1 else values.dtype
    out = torch.empty(parts, batch, heads, r, d, dtype=wide, device=values.device)
    if out.numel():
        key_value_kernel[(rows * parts,)](
            words, values, out, n, heads, parts, per_part, d, values.stride(0), values.stride(1), values.stride(2),
            R=r, RP=next_power(r), WORDS=words.shape[-1], LOW=low, HIGH=high, PRECISION=_precision(values), DP=next_power(d),
            BT=block, STAGES=3, num_warps=8 if r * d > 2048 or values.dtype == torch.float32 else 4,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(values.dtype)


def query_context(words: Tensor, context: Tensor, low: float, high: float) -> Tensor:
    """context (B, h, r, d) contiguous."""
    batch, heads, n, count = words.shape
    r, d = context.shape[2:]
    out = torch.empty(batch, heads, n, d, dtype=context.dtype, device=words.device)
    if out.numel():
        wide = r * d > 64 * 64 and context.dtype == torch.float32
        block = 128 if n > 64 and not wide else 64
        query_context_kernel[(batch * heads * triton.cdiv(n, block),)](
            words, context, out, n, d, R=r, RP=next_power(r), WORDS=count, LOW=low, HIGH=high, PRECISION=_precision(context),
            DP=next_power(d), BT=block, num_warps=8 if wide else 4,
        )  # fmt: skip
    return out


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
