"""Project, interpolate and transform, a tile of points at a time, one view after another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_columns
from ..tiling import Tile, key, pick


@triton.jit
def _bilinear(plane, x, y, height, width, channels, live, CHANNELS: tl.constexpr, STRIDE: tl.constexpr):
    """Channels-last plane at (x, y), zero outside: float32 (rows, CHANNELS). `plane` points at the view's first pixel."""
    left, top = tl.floor(x), tl.floor(y)
    right_share, low_share = x - left, y - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)
    c = tl.arange(0, CHANNELS)
    value = tl.zeros((x.shape[0], CHANNELS), tl.float32)
    for tap in tl.static_range(4):
        column, row = x0 + tap % 2, y0 + tap // 2
        share = (right_share if tap % 2 else 1.0 - right_share) * (low_share if tap // 2 else 1.0 - low_share)
        inside = live & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        where = plane + (row * width + column)[:, None] * STRIDE + c[None, :]
        found = tl.load(where, mask=inside[:, None] & (c < channels)[None, :], other=0.0)
        value += share[:, None] * found.to(tl.float32)
    return value


@triton.jit
def view_lookup_kernel(
    origin, direction, depths, project, centre, images, features, color_weight, feature_weight, bias, out_weight, out_bias,
    out, geometry, largest, N, S, V, H, W, FH, FW,
    C: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM points; `out` (V, N, C), `geometry` (V, N, 8), `largest` (N, C)."""
    T: tl.constexpr = images.dtype.element_ty
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    live = n < N
    ray = n // S
    t = tl.load(depths + n % S, mask=live, other=1.0)
    ox = tl.load(origin + ray * 3, mask=live, other=0.0)
    oy = tl.load(origin + ray * 3 + 1, mask=live, other=0.0)
    oz = tl.load(origin + ray * 3 + 2, mask=live, other=0.0)
    px = ox + t * tl.load(direction + ray * 3, mask=live, other=0.0)
    py = oy + t * tl.load(direction + ray * 3 + 1, mask=live, other=0.0)
    pz = oz + t * tl.load(direction + ray * 3 + 2, mask=live, other=1.0)
    tx, ty, tz = ox - px, oy - py, oz - pz
    scale = 1.0 / (tl.sqrt(tx * tx + ty * ty + tz * tz) + 1e-6)
    tx, ty, tz = tx * scale, ty * scale, tz * scale
    cs = tl.arange(0, C)
    shift = tl.load(bias + cs).to(tl.float32)[None, :]
    out_shift = tl.load(out_bias + cs).to(tl.float32)[None, :]
    colors = load_columns(color_weight, cs, 0, C, 4, 16, T)
    feats = load_columns(feature_weight, cs, 0, C, F, F, T)
    second = load_columns(out_weight, cs, 0, C, C, C, T)
    g = tl.arange(0, 8)
    most = tl.full((BM, C), -float("inf"), tl.float32)
    for v in tl.range(0, V, num_stages=1):
        p = project + v * 12
        z = tl.load(p + 8) * px + tl.load(p + 9) * py + tl.load(p + 10) * pz + tl.load(p + 11)
        over = 1.0 / tl.maximum(z, 1e-8)
        x = (tl.load(p) * px + tl.load(p + 1) * py + tl.load(p + 2) * pz + tl.load(p + 3)) * over
        y = (tl.load(p + 4) * px + tl.load(p + 5) * py + tl.load(p + 6) * pz + tl.load(p + 7)) * over
        x, y = tl.minimum(tl.maximum(x, -1e6), 1e6), tl.minimum(tl.maximum(y, -1e6), 1e6)
        seen = (x >= 0) & (x <= W - 1) & (y >= 0) & (y <= H - 1) & (z > 0)
        color = _bilinear(images + v * (H * W * 4), x, y, H, W, 4, live, 16, 4)
        fx, fy = x * ((FW - 1.0) / (W - 1.0)), y * ((FH - 1.0) / (H - 1.0))
        feature = _bilinear(features + v * (FH * FW * F), fx, fy, FH, FW, F, live, F, F)
        hidden = tl.dot(feature.to(T), feats, input_precision=PRECISION)
        hidden = tl.dot(color.to(T), colors, hidden, input_precision=PRECISION)
        hidden = tl.maximum(hidden + shift, 0.0).to(T)
        value = (tl.dot(hidden, second, input_precision=PRECISION) + out_shift).to(T)
        most = tl.maximum(most, value.to(tl.float32))
        place = n.to(tl.int64) + v * N
        tl.store(out + place[:, None] * C + cs[None, :], value, mask=live[:, None])
        sx, sy, sz = tl.load(centre + v * 3) - px, tl.load(centre + v * 3 + 1) - py, tl.load(centre + v * 3 + 2) - pz
        scale = 1.0 / (tl.sqrt(sx * sx + sy * sy + sz * sz) + 1e-6)
        sx, sy, sz = sx * scale, sy * scale, sz * scale
        dx, dy, dz = tx - sx, ty - sy, tz - sz
        over = 1.0 / tl.maximum(tl.sqrt(dx * dx + dy * dy + dz * dz), 1e-6)
        dot = tx * sx + ty * sy + tz * sz
        first = tl.where(g == 0, (dx * over)[:, None], tl.where(g == 1, (dy * over)[:, None], (dz * over)[:, None]))
        rest = tl.where(g == 3, dot[:, None], tl.where(g == 4, seen.to(tl.float32)[:, None], 0.0))
        tl.store(geometry + place[:, None] * 8 + g[None, :], tl.where(g < 3, first, rest).to(T), mask=live[:, None])
    tl.store(largest + n[:, None].to(tl.int64) * C + cs[None, :], most.to(T), mask=live[:, None])


def view_lookup(
    origin: Tensor, direction: Tensor, depths: Tensor, project: Tensor, centre: Tensor, images: Tensor, features: Tensor,
    color_weight: Tensor, feature_weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in the op; all contiguous."""
    points, samples = origin.shape[0] * depths.shape[0], depths.shape[0]
    (views, height, width, _), (_, fh, fw, channels) = images.shape, features.shape
    c = out_weight.shape[0]
    out = torch.empty(views, points, c, dtype=images.dtype, device=images.device)
    geometry = torch.empty(views, points, 8, dtype=images.dtype, device=images.device)
    largest = torch.empty(points, c, dtype=images.dtype, device=images.device)
    if points and views:
        half = images.dtype != torch.float32
        tile = Tile(64 if half else 32, c, channels)
        if half:
            tile = pick(images.device, key("view_lookup", c, channels), tile, m=(32, 128), warps=(4, 8))
        view_lookup_kernel[(triton.cdiv(points, tile.m),)](
            origin, direction, depths, project, centre, images, features, color_weight, feature_weight, bias, out_weight, out_bias,
            out, geometry, largest, points, samples, views, height, width, fh, fw,
            C=c, F=channels, PRECISION="tf32" if half else "tf32x3", BM=tile.m, num_warps=tile.warps,
        )  # fmt: skip
    return out, geometry, largest
