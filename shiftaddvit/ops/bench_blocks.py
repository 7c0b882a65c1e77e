"""What `ops.bench` measures of the fused blocks of PVTv2-B0, against the same block in torch, eager and compiled."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_cases import Case, normal
from .conv_gelu import conv_gelu
from .linear_attention import attention_encode, attention_mix
from .norm_linear import norm_linear, route_rows
from .patch_embed import flatten_weight, patch_embed

B0 = ((56, 32, 256, 1), (28, 64, 512, 2), (14, 160, 640, 5), (7, 256, 1024, 8))
"""PVTv2-B0 at 224²: side, channels, hidden channels and heads of each stage."""

_HALF = torch.float16


class Block:
    """Random parameters of one block of B0 and its pieces, ours (`backend`) and torch's. `experts` is 1 or 2."""

    def __init__(self, side: int, c: int, hidden: int, heads: int, experts: int):
        self.side, self.c, self.hidden, self.heads, self.experts = side, c, hidden, heads, experts
        self.norm = normal(c) + 1, normal(c)
        self.qkv, self.qkv_bias = self._linear(3 * c, c)
        self.proj, self.proj_bias = self._linear(c, c)
        self.fc1, self.fc1_bias = self._linear(hidden, c)
        self.fc2, self.fc2_bias = self._linear(c, hidden)
        two = experts == 2
        self.narrow, self.merged, self.wide = (normal(2, width) if two else None for width in (c, c, hidden))
        rows = (route_rows(router, _HALF) if two else None for router in (self.narrow, self.merged, self.wide))
        self.narrow_rows, self.merged_rows, self.wide_rows = rows
        self.taps, self.taps_bias = normal(9, hidden, dtype=_HALF, scale=0.3), normal(hidden)
        self.filters = self.taps.t().reshape(hidden, 1, 3, 3).to(_HALF)
        self.token_conv = normal(heads, 9, scale=0.3)

    def _linear(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return normal(self.experts, outputs, inputs, dtype=_HALF, scale=inputs**-0.5), normal(self.experts, outputs)

    def first(self, x: Tensor, backend: str = "auto") -> Tensor:
        router = self.narrow_rows if x.dtype == _HALF else self.narrow
        return norm_linear(x, self.fc1.to(x.dtype), self.fc1_bias, self.norm, 1e-5, router, backend=backend)[0]

    def second(self, h: Tensor, x: Tensor, backend: str = "auto") -> Tensor:
        a = conv_gelu(h, self.side, self.side, self.taps.to(h.dtype), self.taps_bias, backend=backend)
        router = self.wide_rows if h.dtype == _HALF else self.wide
        return norm_linear(a, self.fc2.to(h.dtype), self.fc2_bias, router=router, residual=x, backend=backend)[0]

    def attention(self, x: Tensor, backend: str = "auto") -> Tensor:
        first, second = (self.narrow_rows, self.merged_rows) if x.dtype == _HALF else (self.narrow, self.merged)
        encoded = attention_encode(x, self.qkv.to(x.dtype), self.heads, self.qkv_bias, self.norm, 1e-5, first, backend=backend)
        return attention_mix(encoded, self.proj.to(x.dtype), self.proj_bias, second, x, self.token_conv, backend=backend)[0]

    def stock_first(self, x: Tensor) -> Tensor:
        return F.linear(self._stock_norm(x), self.fc1[0], self.fc1_bias[0].half())

    def stock_second(self, h: Tensor, x: Tensor) -> Tensor:
        pictures = h.reshape(-1, self.side, self.side, self.hidden).permute(0, 3, 1, 2)
        a = F.gelu(F.conv2d(pictures, self.filters, self.taps_bias.half(), padding=1, groups=self.hidden))
        return x + F.linear(a.permute(0, 2, 3, 1).reshape(h.shape), self.fc2[0], self.fc2_bias[0].half())

    def stock_attention(self, x: Tensor) -> Tensor:
        y = F.linear(self._stock_norm(x), self.qkv[0], self.qkv_bias[0].half())
        q, k, v = y.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = ((t > t.mean(-1, keepdim=True)).to(t.dtype) for t in (q, k))
        o = q @ ((k.transpose(-2, -1) @ v) / x.shape[1]) / torch.pi + v / 2
        conv = F.conv2d(v, self.token_conv[:, None, :, None].half(), padding=(4, 0), groups=self.heads)
        o = F.normalize(o, dim=-1) + conv
        return x + F.linear(o.transpose(1, 2).flatten(2), self.proj[0], self.proj_bias[0].half())

    def _stock_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.c,), self.norm[0].half(), self.norm[1].half())


def _with_stock(ours: dict, stock, experts: int) -> dict:
    """Torch has no kernel for two experts; its times stand beside one expert's."""
    return ours | ({"torch fp16": stock, "torch.compile fp16": torch.compile(stock)} if experts == 1 else {})


def mlp_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """The two halves of every stage's MLP."""
    for batch in batches:
        for side, c, hidden, heads in B0:
            n, m = side * side, batch * side * side
            for experts in (1, 2):
                block = Block(side, c, hidden, heads, experts)
                yield Case(
                    "mlp",
                    f"LN + fc1 x{experts} ({m},{c}->{hidden})",
                    lambda b=batch, n=n, c=c: (normal(b, n, c, dtype=_HALF),),
                    lambda x, f=block: f.first(x.float(), "reference"),
                    _with_stock({"ours": block.first}, block.stock_first, experts),
                    2 * m * (c + hidden),
                    2 * m * c * hidden * experts,
                    3e-2,
                )
                yield Case(
                    "mlp",
                    f"depthwise + GELU + fc2 x{experts} ({m},{hidden}->{c})",
                    lambda b=batch, n=n, c=c, k=hidden: (normal(b, n, k, dtype=_HALF), normal(b, n, c, dtype=_HALF)),
                    lambda h, x, f=block: f.second(h.float(), x.float(), backend="reference"),
                    _with_stock({"ours": block.second}, block.stock_second, experts),
                    2 * m * (3 * hidden + 2 * c),
                    2 * m * c * hidden * experts,
                    3e-2,
                )


def attention_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """From LayerNorm to residual, the three linear-attention stages; torch's block makes the same codes."""
    for batch in batches:
        for side, c, hidden, heads in B0[:3]:
            n, m = side * side, batch * side * side
            for experts in (1, 2):
                block = Block(side, c, hidden, heads, experts)
                yield Case(
                    "linear_attention",
                    f"block x{experts} ({batch},{n},{c})",
                    lambda b=batch, n=n, c=c: (normal(b, n, c, dtype=_HALF),),
                    lambda x, f=block: f.attention(x.float(), "reference"),
                    _with_stock({"ours": block.attention}, block.stock_attention, experts),
                    # x read twice (LayerNorm, residual), v written and read, the output written, and the codes.
                    2 * m * c * 5 + m * heads * 8,
                    2 * m * c * (4 * c * experts + 2 * c // heads),
                    1e-1,
                )


def patch_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """The stem and two later patch embeddings."""
    for batch in batches:
        for c, side, n, kernel, stride, padding in ((3, 224, 32, 7, 4, 3), (32, 56, 64, 3, 2, 1), (160, 14, 256, 3, 2, 1)):
            weight, bias = normal(n, c, kernel, kernel, dtype=_HALF, scale=(c * kernel**2) ** -0.5), normal(n)
            norm, size = (normal(n) + 1, normal(n)), None if c == 3 else (side, side)

            flat = flatten_weight(weight, size is None)

            def run(x, backend="auto", w=flat, b=bias, g=norm, s=stride, p=padding, z=size, k=kernel):
                return patch_embed(x, w.to(x.dtype), b, s, p, z, k, g, backend=backend)

            def stock(x, w=weight, b=bias, g=norm, s=stride, p=padding, z=size, n=n):
                x = x if z is None else x.transpose(1, 2).reshape(x.shape[0], -1, *z)
                return F.layer_norm(F.conv2d(x, w, b.half(), s, p).flatten(2).transpose(1, 2), (n,), g[0].half(), g[1].half())

            outputs = ((side + 2 * padding - kernel) // stride + 1) ** 2
            yield Case(
                "patch_embed",
                f"({batch},{c},{side}²) k{kernel} -> {n}",
                lambda b=batch, c=c, s=side: (normal(*((b, c, s, s) if c == 3 else (b, s * s, c)), dtype=_HALF),),
                lambda x, f=run: f(x.float(), "reference"),
                _with_stock({"ours": run}, stock, 1),
                2 * batch * (c * side * side + outputs * n),
                2 * batch * outputs * n * c * kernel**2,
            )
