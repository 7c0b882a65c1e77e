"""Adder attention: L1 distances as scores, and an identity mapping against the collapse of the attention's rank (NeurIPS 2021)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftaddvit.layers.attention import MatMul, ProjectedAttention
from shiftaddvit.ops.adder import adder_scores

SCORES = 1 << 27
"""Scores (images × heads × queries × keys) that exist at a time; more are computed a slice of the queries after the other, and in
training again in the backward. 2^27 numbers are half a gigabyte."""


@dataclass(frozen=True)
class AdderAttentionConfig:
    """The form of adder attention."""

    identity: bool = True
    """Add each token's own value to its output."""


class AdderScores(nn.Module):
    """−‖q_i − k_j‖₁ of queries (…, N, d) and turned keys (…, d, M): a product whose every step subtracts and adds."""

    primitive = "adder"

    def forward(self, q: Float[Tensor, "B h N d"], k_turned: Float[Tensor, "B h d M"]) -> Float[Tensor, "B h N M"]:
        return adder_scores(q, k_turned.transpose(-2, -1))


class AdderAttention(ProjectedAttention):
    """out_i = Σ_j softmax_j(−‖q_i − k_j‖₁/√d) v_j + v_i, in float32. Nothing of size N·N·d exists."""

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        head_dim: int,
        config: AdderAttentionConfig = AdderAttentionConfig(),
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__(qkv, proj, heads, head_dim, q_norm, k_norm)
        self.config = config
        self.scores, self.average = AdderScores(), MatMul()

    def attend(self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]) -> Float[Tensor, "B h N d"]:
        with torch.autocast(v.device.type, enabled=False):
            q, k, values = q.float(), k.float(), v.float()
            # How many slices there are depends on the batch, which an exported program leaves open.
            rows = q.shape[2] if torch.compiler.is_exporting() else max(1, SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
            if rows >= q.shape[2]:
                output = self._rows(q, k, values)
            else:
                slices = q.split(rows, dim=2)
                again = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, values))
                parts = [checkpoint(self._rows, part, k, values, use_reentrant=False) if again else self._rows(part, k, values) for part in slices]
                output = torch.cat(parts, dim=2)
            return (output + values if self.config.identity else output).to(v.dtype)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.average((self.scores(q, k.transpose(-2, -1)) * self.head_dim**-0.5).softmax(dim=-1), v)

    @property
    def products(self) -> str:
        return "adder, mult"
