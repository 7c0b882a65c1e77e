"""Performer: softmax attention in linear time by positive orthogonal random features (FAVOR+, ICLR 2021)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.attention import MatMul, ProjectedAttention


@dataclass(frozen=True)
class PerformerConfig:
    """Random features."""

    features: int = 0
    """Number m of features a head; 0 is ⌊d ln d⌋, as published."""
    seed: int = 0
    """Of the draw; each layer adds its own number. The features are part of the checkpoint."""
    epsilon: float = 1e-4
    """Added to every feature, as published: draws attention towards the mean of v where few features carry it all. 0 adds nothing."""

    def __post_init__(self) -> None:
        if self.features < 0 or self.epsilon < 0:
            raise ValueError(f"PerformerConfig: features and epsilon must be 0 or positive, got {self}")


class PerformerAttention(ProjectedAttention):
    """out_i = φ(q_i) (Σ_j φ(k_j)ᵀ v_j) / (φ(q_i) · Σ_j φ(k_j)) with φ(x) = exp(ωx − ‖x‖²/2)/√m of x/d^¼, in float32.

    With ε > 0 each query's greatest projection, and the greatest of an image's and head's keys, are taken away before exp, and ε is added
    after it (published: the greatest of the whole batch). With ε = 0 each feature's greatest exponent over the keys is taken from the keys
    and given to the queries, and then each query's greatest is taken away: both cancel in the quotient, whose denominator is at least 1.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        head_dim: int,
        config: PerformerConfig = PerformerConfig(),
        layer: int = 0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__(qkv, proj, heads, head_dim, q_norm, k_norm)
        self.config = config
        count = config.features or max(1, int(head_dim * math.log(head_dim)))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + layer)
        self.register_buffer("directions", orthogonal_features(count, head_dim, generator))
        self.project, self.key_value, self.query_context = MatMul(), MatMul(), MatMul()

    def attend(self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]) -> Float[Tensor, "B h N d"]:
        with torch.autocast(v.device.type, enabled=False):
            values = v.float()
            queries, keys = self.features(q.float(), k.float())
            context = self.key_value(keys.transpose(-2, -1), values)
            total = (queries * keys.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)
            return (self.query_context(queries, context) / total).to(v.dtype)

    def features(self, q: Float[Tensor, "B h N d"], k: Float[Tensor, "B h N d"]) -> tuple[Tensor, Tensor]:
        """φ of queries and keys, (B, h, N, m), up to factors that cancel in the quotient."""
        (q_seen, q_half), (k_seen, k_half) = self._project(q), self._project(k)
        if self.config.epsilon:
            queries = torch.exp(q_seen - q_half - q_seen.detach().amax(dim=-1, keepdim=True)) + self.config.epsilon
            return queries, torch.exp(k_seen - k_half - k_seen.detach().amax(dim=(-2, -1), keepdim=True)) + self.config.epsilon
        keys = k_seen - k_half
        largest = keys.detach().amax(dim=-2, keepdim=True)
        queries = q_seen - q_half + largest
        return torch.exp(queries - queries.detach().amax(dim=-1, keepdim=True)), torch.exp(keys - largest)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ωx and ‖x‖²/2 of x/d^¼."""
        x = x * self.head_dim**-0.25
        return self.project(x, self.directions.t().float()), x.square().sum(dim=-1, keepdim=True) / 2


def orthogonal_features(count: int, width: int, generator: torch.Generator) -> Float[Tensor, "m d"]:
    """Blocks of orthogonal directions, uniform on the sphere, with the lengths of Gaussian vectors. Drawn on the CPU."""
    blocks = []
    for _ in range(-(-count // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, device="cpu"))
        # The signs of R's diagonal make Q uniform.
        blocks.append((q * r.diagonal().sign()).t())
    lengths = torch.randn(count, width, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths
