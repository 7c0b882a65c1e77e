"""A tile of points, one view after another, with a running softmax in registers: what a view sees is read once, nothing wide is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..feed_forward.kernels import with_feed_forward
from ..tiles import load_columns, normalised_rows
from ..tiling import Tile, key, pick


@triton.jit
def view_attention_kernel(
    q, x, geometry, gamma, beta, query_weight, key_weight, near_weight, hidden_bias, pos_weight, pos_bias, logit_weight, value_weight,
    pos_value, out_weight, out_bias, ff_gamma, ff_beta, w1, b1, w2, b2, router1, router2, out, N, V, eps, ff_eps,
    C: tl.constexpr, U: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    live = n < N
    cs, us, gs = tl.arange(0, C), tl.arange(0, U), tl.arange(0, 16)
    rows = n[:, None].to(tl.int64) * C + cs[None, :]
    inside = live[:, None] & (cs < C)[None, :]
    a = normalised_rows(tl.load(q + rows, mask=inside, other=0.0).to(tl.float32), inside, C, eps)
    a = a * tl.load(gamma + cs).to(tl.float32)[None, :] + tl.load(beta + cs).to(tl.float32)[None, :]
    query = tl.dot(a.to(T), load_columns(query_weight, us, 0, U, C, C, T), input_precision=PRECISION)
    query = tl.load(hidden_bias + us).to(tl.float32)[None, :] - query
    to_near = load_columns(pos_weight, us, 0, U, 8, 16, T)
    near_shift = tl.load(pos_bias + us).to(tl.float32)[None, :]
    to_hidden = load_columns(near_weight, us, 0, U, U, U, T)
    key = load_columns(key_weight, us, 0, U, C, C, T)
    to_logits = load_columns(logit_weight, cs, 0, C, U, U, T)
    to_value = load_columns(value_weight, cs, 0, C, C, C, T)
    to_pos = load_columns(pos_value, cs, 0, C, U, U, T)
    largest = tl.full((BM, C), -float("inf"), tl.float32)
    total = tl.zeros((BM, C), tl.float32)
    mixed = tl.zeros((BM, C), tl.float32)
    for v in tl.range(0, V, num_stages=STAGES):
        place = n.to(tl.int64) + v * N
        seen = tl.load(x + place[:, None] * C + cs[None, :], mask=inside, other=0.0)
        where = tl.load(geometry + place[:, None] * 8 + gs[None, :], mask=live[:, None] & (gs < 8)[None, :], other=0.0)
        visible = tl.load(geometry + place * 8 + 4, mask=live, other=0.0) != 0
        near = tl.maximum(tl.dot(where, to_near, input_precision=PRECISION) + near_shift, 0.0).to(T)
        hidden = tl.dot(seen, key, query, input_precision=PRECISION)
        hidden = tl.maximum(tl.dot(near, to_hidden, hidden, input_precision=PRECISION), 0.0).to(T)
        # In units of log 2, so that the exponential is one instruction.
        logits = tl.dot(hidden, to_logits, input_precision=PRECISION) * 1.4426950408889634
        logits = tl.where(visible[:, None], logits, -1e9)
        value = tl.dot(seen, to_value, input_precision=PRECISION)
        value = tl.dot(near, to_pos, value, input_precision=PRECISION)
        # Of the two factors of a running softmax one is always 1: one exponential makes both.
        small = tl.exp2(-tl.abs(logits - largest))
        grows = logits > largest
        keep, weight = tl.where(grows, small, 1.0), tl.where(grows, 1.0, small)
        total = total * keep + weight
        mixed = mixed * keep + weight * value
        largest = tl.maximum(largest, logits)
    y = tl.dot((mixed / total).to(T), load_columns(out_weight, cs, 0, C, C, C, T), input_precision=PRECISION)
    y = y + tl.load(out_bias + cs).to(tl.float32)[None, :] + tl.load(q + rows, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        y = with_feed_forward(
            y, inside, ff_gamma, ff_beta, ff_eps, w1, b1, w2, b2, router1, router2, C, HIDDEN, FIRST, SECOND, PRECISION, BM, BH, 1, T
        )
    tl.store(out + rows, y.to(T), mask=inside)


def view_tile(views: int, c: int, experts: str, half: bool, device: torch.device) -> Tile:
    """Points of a tile (m) and hidden channels of the feed-forward at a time (k); `n` is not used. `experts` are those of its two linears:
    `00` without one."""
    # Mixtures hold two accumulators: half of the hidden channels at a time, or compilers before Triton 3.9 spill.
    usual = Tile(64 if half and c <= 64 else 32, c, 32 if "2" in experts else 64, 4, 2)
    if not half:
        return usual
    return pick(device, key(f"view_attention{experts}", views, c), usual, m=(32, 128), warps=(4, 8), stages=(1, 3))


def view_attention(
    q: Tensor, x: Tensor, geometry: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, query_weight: Tensor, key_weight: Tensor,
    near_weight: Tensor, hidden_bias: Tensor, pos_weight: Tensor, pos_bias: Tensor, logit_weight: Tensor, value_weight: Tensor,
    pos_value: Tensor, out_weight: Tensor, out_bias: Tensor, feed: list[Tensor | None], feed_eps: float,
) -> Tensor:  # fmt: skip
    """Shapes as in the op; all contiguous."""
    (views, points, c), out = x.shape, torch.empty_like(q)
    if points:
        weights = feed or [None] * 8
        first, second, hidden = (feed[2].shape[0], feed[4].shape[0], feed[2].shape[1]) if feed else (0, 0, 0)
        half = q.dtype != torch.float32
        tile = view_tile(views, c, f"{first}{second}", half, q.device)
        view_attention_kernel[(triton.cdiv(points, tile.m),)](
            q, x, geometry, norm_weight, norm_bias, query_weight, key_weight, near_weight, hidden_bias, pos_weight, pos_bias,
            logit_weight, value_weight, pos_value, out_weight, out_bias, *weights, out, points, views, eps, feed_eps,
            C=c, U=query_weight.shape[0], HIDDEN=hidden, FIRST=first, SECOND=second, BH=tile.k, PRECISION="tf32" if half else "tf32x3",
            BM=tile.m, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out
