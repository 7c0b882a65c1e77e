"""One ray after another a program: keys and values (softmax) or values and the context (linear) first, then what every point makes of them."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..feed_forward.kernels import with_feed_forward
from ..tiles import load_columns, normalised_rows
from ..tiling import Tile, key, pick, processors


@triton.jit
def _tile(x, first, s, S, gamma, beta, eps, C: tl.constexpr, T: tl.constexpr):
    """Rows of the ray that starts at row `first`, as float32, normalised in T, and which are there."""
    cs = tl.arange(0, C)
    inside = (s < S)[:, None] & (cs < C)[None, :]
    rows = tl.load(x + (first + s)[:, None].to(tl.int64) * C + cs[None, :], mask=inside, other=0.0).to(tl.float32)
    a = normalised_rows(rows, inside, C, eps)
    a = a * tl.load(gamma + cs).to(tl.float32)[None, :] + tl.load(beta + cs).to(tl.float32)[None, :]
    return rows, a.to(T), inside


@triton.jit
def _codes(x, FORM: tl.constexpr, LOW: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """Queries or keys (BM, C) as codes, head by head."""
    x = tl.reshape(x, (BM, HEADS, D))
    if FORM == "float":
        x = x * tl.rsqrt(tl.sum(x * x, 2) + 1e-12)[:, :, None]
    elif FORM == "token":
        x = tl.where(x > (tl.sum(x, 2) / D)[:, :, None], 1.0, LOW)
    else:
        x = tl.where(x > 0, 1.0, LOW)
    return tl.reshape(x, (BM, HEADS * D))


@triton.jit
def _softmax_mixed(
    a,
    kept,
    w,
    proj,
    S,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
):
    """Softmax attention of BM points over the whole ray, projected; `kept` has k of every point (S, C), then v transposed (C, S)."""
    cs, i = tl.arange(0, C), tl.arange(0, D)
    acc = tl.zeros((BM, C), tl.float32)
    for head in tl.static_range(HEADS):
        q = tl.dot(a, load_columns(w, head * D + i, 0, 3 * C, C, C, T), input_precision=PRECISION).to(T)
        largest = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        mixed = tl.zeros((BM, D), tl.float32)
        for start in tl.range(0, S, BK, num_stages=1):
            j = start + tl.arange(0, BK)
            there = j < S
            keys = tl.load(kept + j[None, :] * C + (head * D + i)[:, None], mask=there[None, :], other=0.0)
            scores = tl.dot(q, keys, input_precision=PRECISION) * (1.4426950408889634 * (1.0 / D) ** 0.5)
            scores = tl.where(there[None, :], scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
            shrink = tl.exp2(largest - new)
            total = total * shrink + tl.sum(weights, 1)
            values = tl.load(kept + S * C + (head * D + i)[None, :] * S + j[:, None], mask=there[:, None], other=0.0)
            mixed = tl.dot(weights.to(T), values, mixed * shrink[:, None], input_precision=PRECISION)
            largest = new
        acc = tl.dot((mixed / total[:, None]).to(T), load_columns(proj, cs, head * D, C, C, D, T), acc, input_precision=PRECISION)
    return acc


@triton.jit
def ray_transformer_kernel(
    x, scratch, gamma, beta, w, proj, proj_bias, conv, ff_gamma, ff_beta, w1, b1, w2, b2, router1, router2, out, R, S, eps, ff_eps, scale,
    C: tl.constexpr, HEADS: tl.constexpr, FORM: tl.constexpr, LOW: tl.constexpr, OWN: tl.constexpr, UNIT: tl.constexpr, WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = x.dtype.element_ty
    D: tl.constexpr = C // HEADS
    KEPT: tl.constexpr = 2 * C if FORM == "softmax" else C
    cs = tl.arange(0, C)
    # Its own piece of scratch memory, used again for every ray, so that it stays in the cache.
    kept = scratch + tl.program_id(0).to(tl.int64) * S * KEPT
    for ray in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=1):
        first = ray * S
        context = tl.zeros((C, C), tl.float32)
        for start in tl.range(0, S, BM, num_stages=1):
            s = start + tl.arange(0, BM)
            _, a, inside = _tile(x, first, s, S, gamma, beta, eps, C, T)
            k = tl.dot(a, load_columns(w, C + cs, 0, 3 * C, C, C, T), input_precision=PRECISION)
            v = tl.dot(a, load_columns(w, 2 * C + cs, 0, 3 * C, C, C, T), input_precision=PRECISION).to(T)
            if FORM == "softmax":
                # v transposed, so that both products read shared memory along their sums: see `ray_tile`.
                tl.store(kept + s[:, None] * C + cs[None, :], k.to(T), mask=inside)
                tl.store(kept + S * C + cs[None, :] * S + s[:, None], v, mask=inside)
            else:
                tl.store(kept + s[:, None] * KEPT + cs[None, :], v, mask=inside)
                k = tl.where(inside, _codes(k, FORM, LOW, HEADS, D, BM), 0.0).to(T)
                context = tl.dot(tl.trans(k), tl.where(inside, v, 0.0).to(T), context, input_precision=PRECISION)
        # What other threads of this program wrote is read from here on.
        tl.debug_barrier()
        if FORM != "softmax":
            # Heads do not see each other; divided by S the sums stay in the range of half precision, and two parts keep their precision.
            context = tl.where((cs // D)[:, None] == (cs // D)[None, :], context / S, 0.0)
            high = context.to(T)
            rest = (context - high.to(tl.float32)).to(T)
        for start in tl.range(0, S, BM, num_stages=1):
            s = start + tl.arange(0, BM)
            y, a, inside = _tile(x, first, s, S, gamma, beta, eps, C, T)
            if FORM == "softmax":
                acc = _softmax_mixed(a, kept, w, proj, S, HEADS, C, D, PRECISION, BM, BM, T)
            else:
                q = tl.dot(a, load_columns(w, cs, 0, 3 * C, C, C, T), input_precision=PRECISION)
                q = _codes(q, FORM, LOW, HEADS, D, BM).to(T)
                o = tl.dot(q, high, input_precision=PRECISION)
                if T != tl.float32:
                    o = tl.dot(q, rest, o)
                o = o * scale
                here = kept + s[:, None] * C + cs[None, :]
                value = tl.load(here, mask=inside, other=0.0).to(tl.float32)
                if OWN:
                    o = o + 0.5 * value
                if UNIT:
                    o = tl.reshape(o, (BM, HEADS, D))
                    o = tl.reshape(o * tl.rsqrt(tl.sum(o * o, 2) + 1e-12)[:, :, None], (BM, C))
                if WINDOW:
                    # A real loop: unrolled, the loads of all taps are in flight at once and do not fit the registers.
                    for tap in tl.range(0, WINDOW, num_stages=1):
                        shift = tap - WINDOW // 2
                        near = inside & ((s + shift >= 0) & (s + shift < S))[:, None]
                        factor = tl.load(conv + (cs // D) * WINDOW + tap).to(tl.float32)[None, :]
                        o = o + factor * tl.load(here + shift * C, mask=near, other=0.0).to(tl.float32)
                acc = tl.dot(o.to(T), load_columns(proj, cs, 0, C, C, C, T), input_precision=PRECISION)
            y = y + acc
            if HAS_BIAS:
                y = y + tl.load(proj_bias + cs).to(tl.float32)[None, :]
            y = with_feed_forward(
                y, inside, ff_gamma, ff_beta, ff_eps, w1, b1, w2, b2, router1, router2, C, HIDDEN, FIRST, SECOND, PRECISION, BM, BH, STAGES, T
            )
            tl.store(out + (first + s)[:, None].to(tl.int64) * C + cs[None, :], y.to(T), mask=inside)
        # The next ray overwrites what this one's slower threads may still read.
        tl.debug_barrier()


def ray_tile(c: int, form: str, experts: str, half: bool, device: torch.device) -> Tile:
    """Points of a tile (m), hidden units at a time (k), and programs a multiprocessor (n)."""
    if half and c <= 64:
        # Mixtures hold two accumulators, codes a context: fewer hidden channels at a time, or compilers from Triton 3.6 on spill.
        hidden = 64 if "2" not in experts else 32 if form == "softmax" else 16
        usual = Tile(64, 2, hidden, 4, 1)
    else:
        usual = Tile(32, 2, 32, 4, 1)
    if not half:
        return usual
    # With 8 warps the assembler of CUDA 12.8 (Triton 3.6) miscompiles softmax, as it does with v as it comes (docs/performance.md).
    return pick(
        device, key(f"ray_transformer{experts}", form, c), usual, m=(32, 64), n=(1, 8), k=(16, 64), warps=(4, 4 if form == "softmax" else 8)
    )


def ray_transformer(
    x: Tensor, heads: int, norm_weight: Tensor, norm_bias: Tensor, eps: float, qkv: Tensor, proj: Tensor, proj_bias: Tensor | None,
    feed: list[Tensor | None], feed_eps: float, form: str, low: float, own: bool, context_mean: bool, unit: bool, conv: Tensor | None,
) -> Tensor:  # fmt: skip
    """Shapes as in the op; all contiguous."""
    (rays, samples, c), out = x.shape, torch.empty_like(x)
    if x.numel():
        half = x.dtype != torch.float32
        tile = ray_tile(c, form, f"{feed[2].shape[0]}{feed[4].shape[0]}", half, x.device)
        programs = min(rays, tile.n * processors(x.device))
        scratch = torch.empty(programs, samples, 2 * c if form == "softmax" else c, dtype=x.dtype, device=x.device)
        ray_transformer_kernel[(programs,)](
            x, scratch, norm_weight, norm_bias, qkv, proj, proj_bias, conv, *feed, out, rays, samples, eps, feed_eps,
            (1.0 if context_mean else float(samples)) / math.pi,
            C=c, HEADS=heads, FORM=form, LOW=low, OWN=own, UNIT=unit, WINDOW=0 if conv is None else conv.shape[1],
            HAS_BIAS=proj_bias is not None, HIDDEN=feed[2].shape[1], FIRST=feed[2].shape[0], SECOND=feed[4].shape[0],
            PRECISION="tf32" if half else "tf32x3", BM=tile.m, BH=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out
