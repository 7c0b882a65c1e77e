"""Attention modules as steps: linear attention over codes in two ops, softmax attention with or without spatial reduction, and
every other form of linear attention through its own layer between two projections."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.attention import ProjectedAttention, merge_heads
from shiftaddvit.ops.attn_block import attn_block, fits
from shiftaddvit.ops.layer_norm import layer_norm
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix
from shiftaddvit.ops.softmax_attention import softmax_attention

from .embed import EmbedStep
from .program import About, Launch
from .weights import Activation, Norm, Projection, activate

HEAD_WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the attention kernels take."""

FEWEST_TOKENS: int | None = None
"""From so many on, of a whole batch, `attn_block` computes a block that its kernels take; None is never, until it has been measured."""


@dataclass(frozen=True)
class LinearAttentionStep:
    """x + proj(mix(encode(norm(x)))): angular attention in two ops."""

    name: str
    """Module name in the model."""
    tokens: int
    """Of one image."""
    heads: int
    """Of queries, keys and values."""
    norm: Norm
    """Before the projection."""
    qkv: Projection
    """Queries, keys and values, or shared queries and keys, then values."""
    proj: Projection
    """After the heads are merged."""
    conv: Float[Tensor, "h window"] | None
    """Token convolution of v."""
    rule: str
    """Threshold of a code: `token` or `zero`."""
    codes: str
    """`zero-one`, `plus-minus`, or `float` for unit-length queries and keys."""
    local: str
    """½ of the token's own v (`own`), of the mean of v (`mean`), or `none`."""
    context_mean: bool
    """Whether the context is divided by the number of tokens."""
    output_unit: bool
    """Whether each head's output is scaled to length one."""
    prefix: int
    """Tokens outside the raster of the token convolution."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        if self._fits(x, launch):
            qkv, proj = ((part.weight, part.bias, part.rows) for part in (self.qkv, self.proj))
            form = dict(rule=self.rule, codes=self.codes, local=self.local, context_mean=self.context_mean, output_unit=self.output_unit)
            return attn_block(x, self.heads, self.norm.pair, self.norm.eps, qkv, self.conv, proj, **form, pdl=launch.pdl, backend=launch.backend)
        encoded = attention_encode(
            x,
            heads=self.heads,
            **self.qkv.biased,
            norm=self.norm.pair,
            eps=self.norm.eps,
            rule=self.rule,
            codes=self.codes,
            v_sum=self.local == "mean",
            pdl=launch.pdl,
            backend=launch.backend,
        )
        return attention_mix(
            encoded,
            **self.proj.biased,
            residual=x,
            conv=self.conv,
            codes=self.codes,
            local=self.local,
            context_mean=self.context_mean,
            output_unit=self.output_unit,
            prefix=self.prefix,
            pdl=launch.pdl,
            backend=launch.backend,
        )[0]

    def _fits(self, x: Float[Tensor, "B N C"], launch: Launch) -> bool:
        """Whether `attn_block` has kernels for it, and it is large enough."""
        if launch.backend not in ("auto", "triton") or FEWEST_TOKENS is None or len(x) * x.shape[1] < FEWEST_TOKENS:
            return False
        if self.codes == "float" or (self.prefix and self.conv is not None) or self.qkv.bias is None or self.proj.bias is None:
            return False
        return fits(x, self.heads, self.qkv.weight, self.proj.weight, 0 if self.conv is None else self.conv.shape[1], self.local)

    def about(self) -> About:
        products = "mult" if self.codes == "float" else "add"
        primitives = f"{self.qkv.primitive}, {products}, {self.proj.primitive}"
        return About("norm_linear + context + apply + norm_linear", f"{self.tokens}×{self.proj.weight.shape[1]}", primitives, True)


@dataclass(frozen=True)
class AngularStep:
    """x + proj(core(qkv(norm(x)))), the core being the attention layer itself without its projections, in float32."""

    name: str
    """Module name in the model."""
    tokens: int
    """Of one image."""
    norm: Norm
    """Before the projection."""
    qkv: Projection
    """As the layer has it."""
    proj: Projection
    """As the layer has it."""
    core: ProjectedAttention
    """A copy of the layer whose projections do nothing."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        q, k, v = self.core.queries_keys_values(self.qkv.run(x, launch, self.norm).float())
        return self.proj.run(merge_heads(self.core.mixed(q, k, v)).to(x.dtype), launch, residual=x)

    def about(self) -> About:
        products = self.core.products if self.core.enabled else "mult"
        primitives = f"{self.qkv.primitive}, {products}, {self.proj.primitive}"
        ops = f"norm_linear + {type(self.core).__name__} + norm_linear"
        return About(ops, f"{self.tokens}×{self.proj.weight.shape[1]}", primitives, False)


@dataclass(frozen=True)
class PooledStep:
    """Keys' and values' tokens in PVTv2's linear variant: pooled to 7×7, projected, normalised, activated."""

    embed: EmbedStep
    """The 1×1 convolution and the norm over the pooled grid."""
    size: tuple[int, int]
    """Grid of the tokens."""
    pool: tuple[int, int]
    """Grid after pooling."""
    activation: Activation
    """After the norm."""

    def run(self, a: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B M C"]:
        pictures = a.transpose(1, 2).unflatten(2, self.size)
        pooled = F.adaptive_avg_pool2d(pictures, self.pool).flatten(2).transpose(1, 2)
        return activate(self.embed.run(pooled.contiguous(), launch), self.activation)


@dataclass(frozen=True)
class SoftmaxAttentionStep:
    """x + proj(softmax(q kᵀ/√d) v), keys and values perhaps from a reduced grid."""

    name: str
    """Module name in the model."""
    tokens: int
    """Of one image."""
    heads: int
    """Of queries, keys and values."""
    norm: Norm
    """Before the projections."""
    sources: tuple[Projection, ...]
    """One that makes q, k and v (or shared queries and keys, then v), or two: of q, and of k and v."""
    reduction: EmbedStep | PooledStep | None
    """What stands between the norm and the projection of keys and values."""
    q_norm: Norm | None
    """Over the channels of a head."""
    k_norm: Norm | None
    """Likewise."""
    proj: Projection
    """After the heads are merged."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        return self.proj.run(self._attend(*self._queries_keys_values(x, launch), launch), launch, residual=x)

    def _queries_keys_values(self, x: Tensor, launch: Launch) -> tuple[Tensor, Tensor, Tensor]:
        width = self.proj.weight.shape[2]
        if self.reduction is not None:
            a = layer_norm(x, *self.norm.pair, self.norm.eps, pdl=launch.pdl, backend=launch.backend)
            reduced = self.reduction.run(a, launch)
            parts = [self.sources[0].run(a, launch), *self.sources[1].run(reduced, launch).split(width, dim=-1)]
        else:
            parts = [part for source in self.sources for part in source.run(x, launch, self.norm).split(width, dim=-1)]
        # Adders keep the dtype of their input, others have that of their weights.
        return tuple(part.to(parts[-1].dtype) for part in (parts[0], parts[-2], parts[-1]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> Tensor:
        if self.kernel:
            return softmax_attention(q, k, v, self.heads, launch.pdl, launch.backend)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = self.q_norm.run(q) if self.q_norm else q, self.k_norm.run(k) if self.k_norm else k
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    @property
    def kernel(self) -> bool:
        """Whether the package's own softmax kernel takes it; torch's does otherwise."""
        width = self.proj.weight.shape[2] // self.heads
        return width in HEAD_WIDTHS and self.q_norm is None and self.k_norm is None

    def about(self) -> About:
        attend = "softmax_attention" if self.kernel else "scaled_dot_product_attention"
        projections = " + ".join(["norm_linear"] * len(self.sources))
        before = f"layer_norm + {'pool + ' if isinstance(self.reduction, PooledStep) else ''}patch_embed + " if self.reduction else ""
        primitives = ", ".join([*(p.primitive for p in self.sources), "mult", self.proj.primitive])
        reduced = self.reduction is None or isinstance(self.reduction, EmbedStep)
        fused = self.kernel and reduced and all(p.fusable for p in (*self.sources, self.proj))
        return About(f"{before}{projections} + {attend} + norm_linear", f"{self.tokens}×{self.proj.weight.shape[1]}", primitives, fused)


def bare(layer: ProjectedAttention, device: torch.device) -> ProjectedAttention:
    """A float32 copy of the layer in evaluation mode, its projections replaced by nothing."""
    kept = {name: child for name, child in layer._modules.items() if name in ("qkv", "proj")}
    memo = {id(child): nn.Identity() for child in kept.values()}
    core = deepcopy(layer, memo).to(device=device, dtype=torch.float32).eval()
    return core.requires_grad_(False)
