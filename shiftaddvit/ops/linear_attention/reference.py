"""Linear attention with binary or unit-length queries and keys, step by step in float32."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..bits import pack_bits, unpack_bits
from ..norm_linear.reference import experts


def encode(
    x: Float[Tensor, "B N C"], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    router: Tensor | None, threshold: Float[Tensor, "2 h"] | None, heads: int, rule: str, codes: str, v_sum: bool, k_sum: bool, parts: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the op `attention_encode`; the first part holds the whole sum, the others nothing. v is a view of rows of 3C or 2C."""
    a = x if x.dtype == torch.float64 else x.float()
    batch, tokens, width = a.shape
    if norm_weight is not None:
        a = F.layer_norm(a, (width,), norm_weight.to(a.dtype), norm_bias.to(a.dtype), eps)
    y, choice = experts(a.reshape(-1, width), weight, bias, router)
    rows = y.to(weight.dtype)
    merged, y = rows.reshape(batch, tokens, y.shape[-1]).contiguous()[..., y.shape[-1] - width :], rows.to(y.dtype)
    y = y.reshape(batch, tokens, y.shape[-1] // width, heads, width // heads).permute(2, 0, 3, 1, 4)  # (2 or 3, B, h, N, d)
    q, k, v = y[0], y[-2], y[-1].to(weight.dtype)
    if codes == "float":
        q, k = unit(q).to(weight.dtype), unit(k).to(weight.dtype)
        queries = q.contiguous()
    else:
        levels = threshold if rule == "given" else (None, None)
        q, k = (binary(part, level, rule, codes) for part, level in zip((q, k), levels, strict=True))
        queries = pack_bits(q > 0)
    context = k.to(a.dtype).transpose(-2, -1) @ v.to(a.dtype)
    values, keys = (
        _in_first_part(t.to(a.dtype).sum(2), parts) if wanted else a.new_empty(0) for t, wanted in ((v, v_sum), (k, k_sum))
    )
    return queries, merged, _in_first_part(context, parts), values, choice, keys


def _in_first_part(sums: Tensor, parts: int) -> Tensor:
    return torch.stack([sums, *(torch.zeros_like(sums) for _ in range(parts - 1))], dim=1)


def mix(
    queries: Tensor, v: Float[Tensor, "B N C"], context: Float[Tensor, "B S h d d"], v_sum: Float[Tensor, "B S h d"],
    k_sum: Float[Tensor, "B S h d"], conv: Float[Tensor, "h window"] | None, weight: Tensor, bias: Tensor | None, router: Tensor | None, residual: Tensor | None,
    codes: str, local: str, context_mean: bool, output: str, factor: float, prefix: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op `attention_mix`."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, tokens, width = v.shape
    heads, d = context.shape[2], context.shape[3]
    values = v.to(wide).reshape(batch, tokens, heads, d).transpose(1, 2)
    if codes == "float":
        q = queries.to(wide)
    else:
        bits = unpack_bits(queries, d).to(wide)
        q = 2 * bits - 1 if codes == "plus-minus" else bits
    scale = factor / math.pi / (max(tokens, 1) if context_mean else 1)
    o = q @ (context.to(wide).sum(1) * scale)
    if local == "own":
        o = o + values / 2
    elif local == "mean":
        o = o + v_sum.to(wide).sum(1).unsqueeze(2) / (2 * max(tokens, 1))
    if output == "l2":
        o = unit(o)
    elif output == "similarity":
        keys = k_sum.to(wide).sum(1).unsqueeze(2) * scale
        o = o / (0.5 * (1 if context_mean else tokens) + (q * keys).sum(-1, keepdim=True))
    if conv is not None:
        o = o + token_convolution(values, conv.to(wide), prefix)
    y, choice = experts(o.transpose(1, 2).reshape(-1, width), weight, bias, router)
    y = y.reshape(v.shape)
    return (y.to(v.dtype) if residual is None else (y + residual).to(residual.dtype)), choice


def token_convolution(values: Float[Tensor, "B h N d"], conv: Float[Tensor, "h window"], prefix: int) -> Float[Tensor, "B h N d"]:
    """A window over tokens in raster order, one filter a head; each prefix token sees itself only."""
    heads, window = conv.shape
    pictures = F.conv2d(values[:, :, prefix:], conv.reshape(heads, 1, window, 1), padding=(window // 2, 0), groups=heads)
    alone = values[:, :, :prefix] * conv[:, window // 2].reshape(heads, 1, 1)
    return torch.cat([alone, pictures], dim=2)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


def binary(x: Float[Tensor, "B h N d"], level: Float[Tensor, "h"] | None, rule: str, codes: str) -> Tensor:
    """1[x/‖x‖ > threshold] as {0, 1} or {−1, 1}."""
    length = (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    limits = {"token": x.mean(-1, keepdim=True), "zero": torch.zeros_like(length)}
    limit = level.to(x.dtype).reshape(-1, 1, 1) * length if rule == "given" else limits[rule]
    return torch.where(x > limit, 1.0, -1.0 if codes == "plus-minus" else 0.0).to(x.dtype)
