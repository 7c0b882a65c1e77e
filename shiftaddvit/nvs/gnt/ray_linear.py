"""The ray transformer's attention in its linear form (ShiftAddViT, section 5): what `reparameterize` puts in place of `RayAttention`."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.layers.attention import AngularAttention, merge_heads


class RayAngularAttention(AngularAttention):
    """Linear attention along a ray; with binary codes both of its products are additions."""

    def forward(self, x: Float[Tensor, "R S C"], want_weights: bool = False) -> tuple[Float[Tensor, "R S C"], Float[Tensor, "R S"] | None]:
        """The output, and, if wanted, how much the first point attends to each point (mean over heads; sums to 1)."""
        q, k, v = self.queries_keys_values(x)
        if not self.enabled:
            y = F.scaled_dot_product_attention(q, k, v)
            scores = (q[:, :, :1].float() @ k.float().transpose(-1, -2)) * self.head_dim**-0.5
            weights = scores.softmax(dim=-1) if want_weights else None
        else:
            q, k = self.encode(q, k)
            y = self.mix(q, k, v)
            weights = share(q[:, :, :1], k) if want_weights else None
        return self.proj(merge_heads(y).to(x.dtype)), None if weights is None else weights.mean(dim=1)[:, 0]


def share(first: Float[Tensor, "R h 1 d"], k: Float[Tensor, "R h S d"]) -> Float[Tensor, "R h 1 S"]:
    """Similarity to the first point, made to sum to 1; equal shares where nothing is similar."""
    similarity = (first @ k.transpose(-1, -2)).float().clamp_min(0) + 1e-4
    return similarity / similarity.sum(dim=-1, keepdim=True)
