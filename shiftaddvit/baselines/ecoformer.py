"""Ecoformer's attention: linear attention in Hamming space with a normaliser (NeurIPS 2022)."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.attention import AngularAttention, AngularConfig
from shiftaddvit.layers.hashing import HashConfig


class EcoformerAttention(AngularAttention):
    """out_i = [h_i (Σ_j h_jᵀ v_j) + (r+1) v_i] / [h_i · Σ_j h_j + N (r+1)] with ±1 hash codes h of r bits, in float32.

    The denominator is at least N: |h_i · Σ_j h_j| ≤ N r.
    """

    def __init__(self, qkv: nn.Module, proj: nn.Module, heads: int, head_dim: int, add: HashConfig = HashConfig(), q_norm: nn.Module | None = None):
        config = AngularConfig(token_conv=0, output_norm="none", context="sum")
        super().__init__(qkv, proj, heads, head_dim, replace(add, codes="plus-minus"), config, q_norm=q_norm)

    def mix(
        self, q: Float[Tensor, "B h N r"], k: Float[Tensor, "B h N r"], v: Float[Tensor, "B h N d"]
    ) -> Float[Tensor, "B h N d"]:
        with torch.autocast(v.device.type, enabled=False):
            q, k, values = q.float(), k.float(), v.float()
            tokens, bits = k.shape[-2:]
            context = self.key_value(k.transpose(-2, -1), values)
            numerator = self.query_context(q, context) + (bits + 1) * values
            denominator = (q * k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True) + tokens * (bits + 1)
            return (numerator / denominator).to(v.dtype)
