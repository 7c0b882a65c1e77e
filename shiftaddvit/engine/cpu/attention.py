"""Attention over rows: heads are never transposed into tensors of their own."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..attention import LinearAttentionStep, SoftmaxAttentionStep
from ..embed import EmbedStep
from .embed import Embed
from .linear import Linear, linear, normalised
from .onednn import convolve_tokens, onednn, packed


@dataclass(frozen=True)
class LinearAttention:
    """x + proj(mix(encode(norm(x)))): the contexts of all heads are the diagonal blocks of one product over all channels."""

    step: LinearAttentionStep
    """Its parameters."""
    qkv: Linear
    """Over rows."""
    proj: Linear
    """Over rows."""
    blocks: Float[Tensor, "C C"]
    """The factor of the context inside a head's block, zero outside."""
    conv: Float[Tensor, "C 1 1 window"] | None
    """The head's filter for each of its channels; packed for oneDNN where there is one."""

    @classmethod
    def of(cls, step: LinearAttentionStep, int8: bool) -> "LinearAttention":
        width = step.proj.weight.shape[1]
        head = torch.arange(width) // (width // step.heads)
        factor = 1 / (math.pi * (step.tokens if step.context_mean else 1))
        blocks = torch.where(head.unsqueeze(1) == head, factor, 0.0).to(step.qkv.weight.dtype)
        conv = None
        if step.conv is not None:
            conv = step.conv.repeat_interleave(width // step.heads, dim=0).reshape(width, 1, 1, -1).to(step.qkv.weight.dtype)
            if onednn().convolutions:
                conv = packed(conv, (1, width, 1, step.tokens - step.prefix), 1, (0, step.conv.shape[1] // 2), width)
        return cls(step, linear(step.qkv, int8), linear(step.proj, int8), blocks, conv)

    @property
    def how(self) -> str:
        return f"{self.qkv.how} + bmm + {self.proj.how}"

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        step, (batch, tokens, width) = self.step, x.shape
        qkv = self.qkv(normalised(x, step.norm)).view(batch, tokens, -1)
        codes = self._codes(qkv[..., :-width])
        q, k, v = codes[..., :width], codes[..., -width:], qkv[..., -width:]
        context = torch.bmm(k.transpose(1, 2), v) * self.blocks
        if step.local == "own":
            o = torch.baddbmm(v, q, context, beta=0.5)
        else:
            o = torch.bmm(q, context)
            o = o.add_(v.mean(dim=1, keepdim=True), alpha=0.5) if step.local == "mean" else o
        if step.output_unit:
            o = _unit(o.view(batch, tokens, step.heads, -1)).view(x.shape)
        if self.conv is not None:
            o = o.add_(self._convolved(v))
        return self.proj(o.view(-1, width), x.reshape(-1, width)).view(x.shape)

    def _codes(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Of queries and keys together: a code of each channel, or unit vectors."""
        step = self.step
        heads = x.unflatten(-1, (-1, step.proj.weight.shape[1] // step.heads))
        if step.codes == "float":
            return _unit(heads).flatten(-2)
        level = heads.mean(dim=-1, keepdim=True) if step.rule == "token" else heads.new_zeros(())
        codes = torch.gt(heads, level, out=heads.new_empty(heads.shape)).flatten(-2)
        return codes.mul_(2).sub_(1) if step.codes == "plus-minus" else codes

    def _convolved(self, v: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """The token convolution; a prefix token sees itself only."""
        step, width = self.step, v.shape[-1]
        inside = v[:, step.prefix :].contiguous()
        # A picture of one row: oneDNN is twice as fast along rows as along columns.
        grid, padding = (1, inside.shape[1]), (0, step.conv.shape[1] // 2)
        if onednn().convolutions:
            y = convolve_tokens(inside, grid, self.conv, None, grid, 1, padding, width)
        else:
            y = F.conv2d(inside.transpose(1, 2).unsqueeze(2), self.conv, padding=padding, groups=width).squeeze(2).transpose(1, 2)
        if not step.prefix:
            return y
        centre = step.conv[:, padding[1]].repeat_interleave(width // step.heads).to(v.dtype)
        return torch.cat([v[:, : step.prefix] * centre, y], dim=1)


def _unit(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    return x * (x * x).sum(dim=-1, keepdim=True).add_(1e-12).rsqrt_()


@dataclass(frozen=True)
class SoftmaxAttention:
    """x + proj(softmax(q kᵀ/√d) v), keys and values perhaps from a reduced grid."""

    step: SoftmaxAttentionStep
    """Its parameters."""
    sources: tuple[Linear, ...]
    """As the step's."""
    reduction: Embed | None
    """As the step's."""
    proj: Linear
    """Over rows."""

    @classmethod
    def of(cls, step: SoftmaxAttentionStep, int8: bool) -> "SoftmaxAttention | None":
        plain = step.q_norm is None and step.k_norm is None and all(p.fusable for p in (*step.sources, step.proj))
        if not plain or not isinstance(step.reduction, EmbedStep | None):
            return None
        reduction = Embed.of(step.reduction, int8) if step.reduction is not None else None
        return cls(step, tuple(linear(source, int8) for source in step.sources), reduction, linear(step.proj, int8))

    @property
    def how(self) -> str:
        parts = [*(source.how for source in self.sources), "scaled_dot_product_attention", self.proj.how]
        return " + ".join([self.reduction.how, *parts] if self.reduction else parts)

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        batch, _, width = x.shape
        a = normalised(x, self.step.norm)
        inputs = [a] * len(self.sources)
        if self.reduction is not None:
            inputs[1] = self.reduction.run(a.view(x.shape)).flatten(0, 1)
        made = [source(rows).view(batch, -1, source_width) for source, rows, source_width in zip(self.sources, inputs, self._widths, strict=True)]
        parts = [part for y in made for part in y.split(width, dim=-1)]
        q, k, v = (part.unflatten(-1, (self.step.heads, -1)).transpose(1, 2) for part in (parts[0], parts[-2], parts[-1]))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
        return self.proj(o, x.reshape(-1, width)).view(x.shape)

    @property
    def _widths(self) -> list[int]:
        return [source.weight.shape[1] for source in self.step.sources]
