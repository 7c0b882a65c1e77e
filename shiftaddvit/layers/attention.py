"""Attention whose two products are additions: angular linear attention over float, binary or hashed queries and keys (section 4.1).

o_i = local_i + (1/π) q_i (Σ_j k_jᵀ v_j) · scale, optionally normalised, plus a token convolution of v. With binary q and k both
products are `MatAdd`: sums of the rows of v, and then of the context, that a code selects.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftaddvit.numerics import binarize, binary_threshold
from shiftaddvit.numerics.binarize import Codes, Threshold

from .hashing import HashConfig, KernelHash


@dataclass(frozen=True)
class BinaryConfig:
    """How queries and keys become binary codes ("Quant")."""

    threshold: Threshold = "token"
    """`token` (default) and `zero` look at one token only; `tensor` is the published mean over the whole batch."""
    codes: Codes = "zero-one"
    """{0, 1} as published, or {−1, 1}."""
    published_window: bool = False
    """Pass the gradient where 0 ≤ x ≤ 1, as published, instead of where |x − threshold| ≤ 1."""


@dataclass(frozen=True)
class AngularConfig:
    """The form of linear attention. `AngularConfig.published()` is the authors' code; the defaults are the better measured ones."""

    local: Literal["own", "mean", "none"] = "own"
    """½ v_i (published code), ½ of the mean of v (the derivation, divided by N), or nothing."""
    context: Literal["sum", "mean"] = "mean"
    """Σ_j k_jᵀ v_j as it is, or divided by the number of tokens."""
    output_norm: Literal["l2", "similarity", "none"] = "l2"
    """Divide each head's output by its length; by the sum of the similarities, which makes it a weighted mean of v; or leave it."""
    unit_codes: bool = False
    """Divide products of codes by their width (a shift), so that ±1 codes act as the unit vectors that the angular kernel is about."""
    token_conv: int = 9
    """Window in tokens, in raster order, of the depthwise convolution of v, one filter a head; 0 leaves it out."""
    prefix_in_conv: bool = False
    """Let class and distillation tokens take part in the token convolution, as the published code does."""
    shared_qk: bool = False
    """One projection makes queries and keys, as hashing always has it."""
    sparse_threshold: float = 0.0
    """In training add (A ⊙ [A > t]) v with A = softmax(q kᵀ/√d); 0 leaves it out. Published: 0.02."""

    def __post_init__(self) -> None:
        for field, allowed in (
            ("local", ("own", "mean", "none")),
            ("context", ("sum", "mean")),
            ("output_norm", ("l2", "similarity", "none")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"AngularConfig.{field} must be one of {allowed}, got {getattr(self, field)!r}")
        if self.token_conv < 0 or (self.token_conv and self.token_conv % 2 == 0):
            raise ValueError(f"AngularConfig.token_conv must be 0 or odd, got {self.token_conv}")

    @classmethod
    def published(cls) -> "AngularConfig":
        return cls(local="own", context="sum", output_norm="l2", prefix_in_conv=True)


class MatAdd(nn.Module):
    """codes @ values with a binary left operand: every output is a masked sum of rows (of signed rows for ±1 codes).

    The reference multiplies for convenience; `ops/matadd` adds.
    """

    primitive = "add"

    def forward(self, codes: Float[Tensor, "B h M K"], values: Float[Tensor, "B h K N"]) -> Float[Tensor, "B h M N"]:
        return codes @ values.to(codes.dtype)


class MatMul(nn.Module):
    """The same product for float operands."""

    primitive = "mult"

    def forward(self, left: Float[Tensor, "B h M K"], right: Float[Tensor, "B h K N"]) -> Float[Tensor, "B h M N"]:
        return left @ right.to(left.dtype)


class TokenConv(nn.Module):
    """A window over neighbouring tokens (raster order), one filter a head: Conv2d(h, h, (k, 1), groups=h) on (B, h, N, d)."""

    def __init__(self, heads: int, window: int):
        super().__init__()
        self.window = window
        self.weight = nn.Parameter(torch.zeros(heads, 1, window, 1))

    def forward(self, v: Float[Tensor, "B h N d"]) -> Float[Tensor, "B h N d"]:
        if v.is_cuda and torch.is_grad_enabled():
            return self.by_taps(v)
        return F.conv2d(v, self.weight.to(v.dtype), padding=(self.window // 2, 0), groups=v.shape[1])

    def by_taps(self, v: Float[Tensor, "B h N d"]) -> Float[Tensor, "B h N d"]:
        """The same as a sum of shifted copies, in float32: what cuDNN has for this shape is slow to train."""
        tokens = v.shape[-2]
        padded = F.pad(v, (0, 0, self.window // 2, self.window // 2))
        taps = (self.weight[:, :, tap].float() * padded[:, :, tap : tap + tokens] for tap in range(self.window))
        return sum(taps).to(v.dtype)


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention over all tokens (MSA): what spatial-reduction attention becomes without its reduction."""

    def __init__(self, qkv: nn.Module, proj: nn.Module, heads: int):
        super().__init__()
        self.qkv, self.proj, self.heads = qkv, proj, heads

    def forward(
        self, x: Float[Tensor, "B N C"], feat_size: Sequence[int] | None = None
    ) -> Float[Tensor, "B N C"]:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class ProjectedAttention(nn.Module):
    """Attention that a subclass defines by `attend`, between the pre-trained projections: one to queries, keys and values, one of the
    merged heads. `enabled = False` gives softmax attention over the same queries, keys and values.
    """

    shared_qk = False
    """Whether `qkv` makes 2·C channels, one projection for queries and keys and one for values, instead of 3·C."""

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        head_dim: int,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.heads, self.head_dim, self.enabled = heads, head_dim, True
        self.qkv, self.proj = qkv, proj
        self.q_norm, self.k_norm = q_norm or nn.Identity(), k_norm or nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        feat_size: Sequence[int] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "B N C"]:
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self).__name__} has no mask: attn_mask must be None and is_causal False")
        q, k, v = self.queries_keys_values(x)
        return self.proj(merge_heads(self.mixed(q, k, v)).to(x.dtype))

    def queries_keys_values(self, x: Float[Tensor, "B N C"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of (B, h, N, d); with a shared projection q is k."""
        if self.shared_qk:
            qk, v = split_heads(self.qkv(x), self.heads, 2)
            qk = self.q_norm(qk)
            return qk, qk, v
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.q_norm(q), self.k_norm(k), v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "B h N d"]:
        """The attention in use."""
        return self.attend(q, k, v) if self.enabled else F.scaled_dot_product_attention(q, k, v)

    def attend(
        self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
    ) -> Float[Tensor, "B h N d"]:
        """The attention output before the heads are merged."""
        raise NotImplementedError

    @property
    def products(self) -> str:
        """What the products inside are, for tables."""
        return "mult"


class AngularAttention(ProjectedAttention):
    """Linear attention with the angular kernel, float (`add=None`), binary (`BinaryConfig`) or hashed (`HashConfig`).

    Queries and keys share a projection with hashing and `shared_qk`. The first `prefix_tokens` tokens are class or distillation tokens,
    which have no place in the raster.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        head_dim: int,
        add: BinaryConfig | HashConfig | None = None,
        config: AngularConfig = AngularConfig(),
        prefix_tokens: int = 0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__(qkv, proj, heads, head_dim, q_norm, k_norm)
        self.add, self.config, self.prefix_tokens = add, config, prefix_tokens
        self.hash = KernelHash(heads, head_dim, add) if isinstance(add, HashConfig) else None
        self.key_value = MatAdd() if add is not None else MatMul()
        self.query_context = MatAdd() if add is not None else MatMul()
        self.token_conv = TokenConv(heads, config.token_conv) if config.token_conv else None

    @property
    def shared_qk(self) -> bool:
        return self.hash is not None or self.config.shared_qk

    @property
    def products(self) -> str:
        return self.key_value.primitive

    def attend(
        self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
    ) -> Float[Tensor, "B h N d"]:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Codes, lengths and sums in float32 are five times what goes in: computed again instead of kept.
            output = checkpoint(self._encoded_and_mixed, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            output = self._encoded_and_mixed(q, k, v)
        if self.training and self.config.sparse_threshold:
            output = output + self._sparse(q, k, v).to(output.dtype)
        return output

    def _encoded_and_mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mix(*self.encode(q, k), v)

    def encode(self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"]) -> tuple[Tensor, Tensor]:
        """Unit-length queries and keys, or their codes."""
        if self.hash is not None:
            codes = self.hash(unit(q))
            return codes, codes
        q, k = unit(q), unit(k)
        if self.add is None:
            return q, k
        return self._binary(q), self._binary(k)

    def _binary(self, x: Tensor) -> Tensor:
        threshold = binary_threshold(x, self.add.threshold)
        return binarize(x, threshold, self.add.codes, self.add.published_window)

    def mix(
        self, q: Float[Tensor, "B h N r"], k: Float[Tensor, "B h N r"], v: Float[Tensor, "B h N d"]
    ) -> Float[Tensor, "B h N d"]:
        """The attention output before the heads are merged."""
        config = self.config
        # Sums over thousands of tokens leave the range of half precision.
        with torch.autocast(v.device.type, enabled=False):
            q, k, values = q.float(), k.float(), v.float()
            tokens, width = k.shape[-2:]
            scale = 1 / (width if config.unit_codes and self.add is not None else 1)
            scale = scale / (tokens if config.context == "mean" else 1)
            context = self.key_value(k.transpose(-2, -1), values) * (scale / math.pi)
            output = self.query_context(q, context)
            if config.local == "own":
                output = output + values / 2
            elif config.local == "mean":
                output = output + values.mean(dim=-2, keepdim=True) / 2
            if config.output_norm == "l2":
                output = unit(output)
            elif config.output_norm == "similarity":
                keys = k.sum(dim=-2, keepdim=True) * (scale / math.pi)
                output = output / (0.5 * (1 if config.context == "mean" else tokens) + (q * keys).sum(dim=-1, keepdim=True))
        output = output.to(v.dtype)
        return output if self.token_conv is None else output + self._convolve(v)

    def _convolve(self, v: Tensor) -> Tensor:
        if self.config.prefix_in_conv or self.prefix_tokens == 0:
            return self.token_conv(v)
        # A prefix token has no neighbours in the raster: its window holds only itself.
        centre = self.token_conv.weight[:, 0, self.token_conv.window // 2]  # (h, 1)
        prefix = v[:, :, : self.prefix_tokens] * centre.unsqueeze(1).to(v.dtype)
        return torch.cat([prefix, self.token_conv(v[:, :, self.prefix_tokens :])], dim=2)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)
        return torch.where(attention > self.config.sparse_threshold, attention, 0) @ v


def unit(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x / ‖x‖₂ over the last dimension, in float32; a zero vector stays zero with a finite gradient."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-12)


def split_heads(x: Float[Tensor, "B N kC"], heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts·C) → `parts` tensors of (B, h, N, d)."""
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Float[Tensor, "B h N d"]) -> Float[Tensor, "B N C"]:
    """(B, h, N, d) → (B, N, h·d)."""
    return x.transpose(1, 2).flatten(2)
