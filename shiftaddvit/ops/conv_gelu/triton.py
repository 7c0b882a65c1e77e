"""The depthwise convolution as a walk down the picture: every row is loaded once for each of its three columns of neighbours, and adds to
the sums of three rows of outputs, so that nine products take three loads. float16 is summed two channels an instruction."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import interpreting
from ..tiles import GELU_A, GELU_B, GELU_C, GELU_LIMIT, gelu, wait_for_inputs
from ..tiling import Tile, key, next_power, pick, precision, processors


def twice(value: float) -> str:
    """A float16 in both halves of a word."""
    return f"{int.from_bytes(struct.pack('<e', value), 'little') * 0x10001:#010x}"


HALF_GELU = tl.constexpr(
    "{ .reg .b32 s, t, c; mul.rn.f16x2 s, $1, $1; "
    f"mov.b32 c, {twice(GELU_LIMIT.value)}; min.f16x2 s, s, c; "
    f"mov.b32 c, {twice(GELU_C.value)}; mov.b32 t, {twice(GELU_B.value)}; fma.rn.f16x2 t, s, c, t; "
    f"mov.b32 c, {twice(GELU_A.value)}; fma.rn.f16x2 t, s, t, c; mul.rn.f16x2 t, t, $1; tanh.approx.f16x2 t, t; "
    f"mov.b32 c, {twice(0.5)}; mul.rn.f16x2 s, $1, c; fma.rn.f16x2 $0, s, t, s; }}"
)


@triton.jit
def _row(rows, y, x, cs, H, W, C):
    """One row of the tile as each of its three neighbours in the row sees it: left, middle, right, zero outside the picture."""
    here = rows + (y * W + x) * C
    # Of a row outside the picture no column is seen.
    low = tl.where((y >= 0) & (y < H), 0, 1 << 30)
    columns = cs[None, :] < C
    left = tl.load(here[:, None] - C + cs[None, :], mask=((x > low) & (x <= W))[:, None] & columns, other=0)
    middle = tl.load(here[:, None] + cs[None, :], mask=((x >= low) & (x < W))[:, None] & columns, other=0)
    right = tl.load(here[:, None] + C + cs[None, :], mask=((x >= low) & (x < W - 1))[:, None] & columns, other=0)
    return left, middle, right


@triton.jit
def _spread(vector, cs, x, C, T: tl.constexpr):
    """A vector over channels as a whole tile, so that every thread loads its own channels and none is passed through shared memory."""
    inside = (x[:, None] >= 0) & (cs[None, :] < C)
    return tl.load(vector + (x * 0)[:, None] + cs[None, :], mask=inside, other=0.0).to(T)


@triton.jit
def _add(total, left, middle, right, f0, f1, f2, HALF: tl.constexpr):
    """total + left · f0 + middle · f1 + right · f2; HALF: in float16, rounded after each."""
    if HALF:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; fma.rn.f16x2 t, $2, $5, $1; fma.rn.f16x2 t, $3, $6, t; fma.rn.f16x2 $0, $4, $7, t; }",
            "=r,r,r,r,r,r,r,r",
            [total, left, middle, right, f0, f1, f2],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return total + left.to(tl.float32) * f0 + middle.to(tl.float32) * f1 + right.to(tl.float32) * f2


@triton.jit
def _gelu(x, FAST: tl.constexpr, HALF: tl.constexpr):
    """`tiles.gelu`; HALF: the same polynomial and tanh in float16, two at a time (absolute error about 2^-11 · |x|)."""
    if HALF:
        return tl.inline_asm_elementwise(
            HALF_GELU,
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gelu(x, FAST)


@triton.jit
def conv_gelu_kernel(
    h, h_scale, conv, conv_bias, out, H, W, C, bands, strips, HAS_SCALE: tl.constexpr, FAST: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of BM columns and BC channels of one picture."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    cs = (pid % blocks) * BC + tl.arange(0, BC)
    x = ((pid // blocks) % strips) * BM + tl.arange(0, BM)
    first = ((pid // (blocks * strips)) % bands) * ROWS
    picture = (pid // (blocks * strips * bands)).to(tl.int64) * H * W * C
    rows = h + picture
    S: tl.constexpr = tl.float16 if HALF else tl.float32
    # Weights do not come from the kernel before this one.
    a0, a1, a2 = _spread(conv, cs, x, C, S), _spread(conv + C, cs, x, C, S), _spread(conv + 2 * C, cs, x, C, S)
    b0, b1, b2 = _spread(conv + 3 * C, cs, x, C, S), _spread(conv + 4 * C, cs, x, C, S), _spread(conv + 5 * C, cs, x, C, S)
    c0, c1, c2 = _spread(conv + 6 * C, cs, x, C, S), _spread(conv + 7 * C, cs, x, C, S), _spread(conv + 8 * C, cs, x, C, S)
    shift = _spread(conv_bias, cs, x, C, S)
    if HAS_SCALE:
        unit = _spread(h_scale, cs, x, C, S)
        shift = shift / unit
    wait_for_inputs(PDL)
    above = shift
    here = shift
    left, middle, right = _row(rows, first - 1, x, cs, H, W, C)
    if AHEAD == 2:
        left2, middle2, right2 = _row(rows, first, x, cs, H, W, C)
    for r in tl.range(0, ROWS + 2, num_stages=1):
        y = first - 1 + r
        l, m, n = left, middle, right
        # The next rows are on their way while this one is added.
        if AHEAD == 2:
            left, middle, right = left2, middle2, right2
            left2, middle2, right2 = _row(rows, y + 2, x, cs, H, W, C)
        else:
            left, middle, right = _row(rows, y + 1, x, cs, H, W, C)
        total = _add(above, l, m, n, c0, c1, c2, HALF)
        above = _add(here, l, m, n, b0, b1, b2, HALF)
        here = _add(shift, l, m, n, a0, a1, a2, HALF)
        if r >= 2:
            if HAS_SCALE:
                total = total * unit
            value = _gelu(total, FAST, HALF).to(out.dtype.element_ty)
            seen = (x < tl.where(y - 1 < H, W, 0))[:, None] & (cs[None, :] < C)
            tl.store(out + picture + ((y - 1) * W + x)[:, None] * C + cs[None, :], value, mask=seen)


def conv_tile(pictures: int, height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """`m` columns, `n` channels, `k` rows of a program at most; `stages` rows are loaded ahead."""
    problem = key(f"conv_gelu{precision(dtype)}", pictures * height * width, width, channels)
    m = 16 if 8 < width <= 16 else 8
    n = min(64 if pictures == 1 else 128, next_power(channels))
    k = 16
    while k > 2 and pictures * -(-height // k) * -(-width // m) * -(-channels // n) < 4 * processors(device):
        k //= 2
    bounds = {"m": (2, 32), "n": (32, min(256, next_power(channels))), "k": (1, 16), "warps": (1, 8), "stages": (1, 2)}
    return pick(device, problem, Tile(m, n, k, max(1, m * n // 256)), **bounds)


def conv_gelu(
    h: Tensor, height: int, width: int, conv_weight: Tensor, conv_bias: Tensor, h_scale: Tensor | None, pdl: bool = False
) -> Tensor:
    """h (B, height · width, C), conv_weight (9, C)."""
    pictures, _, channels = h.shape
    out = torch.empty(h.shape, dtype=conv_weight.dtype, device=h.device)
    if out.numel() == 0:
        return out
    tile = conv_tile(pictures, height, width, channels, conv_weight.dtype, h.device)
    bands, strips = -(-height // tile.k), -(-width // tile.m)
    flags = {"launch_pdl": True} if pdl else {}
    conv_gelu_kernel[(pictures * bands * strips * -(-channels // tile.n),)](
        h, h_scale, conv_weight, conv_bias, out, height, width, channels, bands, strips, HAS_SCALE=h_scale is not None,
        FAST=conv_weight.dtype != torch.float32 and not interpreting(), HALF=h.dtype == torch.float16 and not interpreting(), PDL=pdl,
        BM=tile.m, BC=tile.n, ROWS=-(-height // bands), AHEAD=tile.stages, num_warps=tile.warps, **flags,
    )  # fmt: skip
    return out
