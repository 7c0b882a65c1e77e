"""GNT's transformer: views attend into each point, points attend along each ray. Published key names."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.reparam.sites import AttentionSite

from ..projector import Seen
from .ray_linear import RayAngularAttention

LINEARS = ("q_fc", "k_fc", "v_fc", "out_fc")
"""The linears of both kinds of attention, under their published names."""


def encode_position(x: Float[Tensor, "*n 3"], frequencies: int = 10) -> Float[Tensor, "*n E"]:
    """x, then sin and cos of 2^i x for i below `frequencies`; 63 values for 10. In float32: 2⁹x has no digits left in half precision."""
    x = x.float()
    angles = x.unsqueeze(-2) * torch.exp2(torch.arange(frequencies, device=x.device, dtype=x.dtype)).unsqueeze(-1)  # (*n, f, 3)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-2)  # (*n, f, 2, 3)
    return torch.cat([x, waves.flatten(-3)], dim=-1)


class FeedForward(nn.Module):
    """Linear, ReLU, linear, with dropout after each."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dp = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        return self.dp(self.fc2(self.dp(F.relu(self.fc1(x)))))


class ViewAttention(nn.Module):
    """Subtraction attention of one query a point over what V views see there; a softmax over the views for every channel.

    v = v_fc(k_fc(x)), a quirk of the published code that its checkpoints depend on.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.pos_fc = nn.Sequential(nn.Linear(4, dim // 8), nn.ReLU(), nn.Linear(dim // 8, dim))
        self.attn_fc = nn.Sequential(nn.Linear(dim, dim // 8), nn.ReLU(), nn.Linear(dim // 8, dim))
        self.out_fc = nn.Linear(dim, dim)
        self.dp = nn.Dropout(dropout)

    def forward(
        self,
        q: Float[Tensor, "R S C"],
        x: Float[Tensor, "R S V C"],
        ray_diff: Float[Tensor, "R S V 4"],
        mask: Float[Tensor, "R S V 1"],
    ) -> Float[Tensor, "R S C"]:
        q, k, pos = self.q_fc(q), self.k_fc(x), self.pos_fc(ray_diff)
        v = self.v_fc(k)
        logits = self.attn_fc(k - q.unsqueeze(2) + pos)
        # A point that no view sees gets equal weights, so the answer stays finite.
        weights = self.dp(logits.float().masked_fill(mask == 0, -1e9).softmax(dim=2)).to(v.dtype)
        return self.dp(self.out_fc(((v + pos) * weights).sum(dim=2)))

    def attention_site(self, name: str) -> AttentionSite:
        """What `reparameterize` may change here."""
        return AttentionSite(name, self, "linears-only", LINEARS, subtracts=True)


class RayAttention(nn.Module):
    """Multi-head dot-product attention over the points of a ray."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_fc = nn.Linear(dim, dim)
        self.dp = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "R S C"], want_weights: bool = False
    ) -> tuple[Float[Tensor, "R S C"], Float[Tensor, "R S"] | None]:
        """The output, and, if wanted, how much the first point attends to each point (mean over heads; sums to 1)."""
        q, k, v = (_heads(layer(x), self.heads) for layer in (self.q_fc, self.k_fc, self.v_fc))
        weights = None
        if want_weights:
            row = (q[:, :, :1].float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
            weights = row.softmax(dim=-1).mean(dim=1)[:, 0]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dp.p if self.training else 0.0)
        return self.dp(self.out_fc(y.transpose(1, 2).flatten(2))), weights

    def attention_site(self, name: str) -> AttentionSite:
        """What `reparameterize` may change here."""
        return AttentionSite(name, self, "split", LINEARS, linear_form=RayAngularAttention)


def _heads(x: Float[Tensor, "R S C"], heads: int) -> Float[Tensor, "R h S d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class ViewBlock(nn.Module):
    """Pre-norm view attention and feed-forward."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ff = ViewAttention(dim, dropout), FeedForward(dim, dropout)

    def forward(
        self,
        q: Float[Tensor, "R S C"],
        x: Float[Tensor, "R S V C"],
        ray_diff: Float[Tensor, "R S V 4"],
        mask: Float[Tensor, "R S V 1"],
    ) -> Float[Tensor, "R S C"]:
        q = q + self.attn(self.attn_norm(q), x, ray_diff, mask)
        return q + self.ff(self.ff_norm(q))


class RayBlock(nn.Module):
    """Pre-norm ray attention and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ff = RayAttention(dim, heads, dropout), FeedForward(dim, dropout)

    def forward(
        self, x: Float[Tensor, "R S C"], want_weights: bool = False
    ) -> tuple[Float[Tensor, "R S C"], Float[Tensor, "R S"] | None]:
        y, weights = self.attn(self.attn_norm(x), want_weights)
        x = x + y
        return x + self.ff(self.ff_norm(x)), weights


class GNTTransformer(nn.Module):
    """From what the views see along rays to a colour a ray, and the attention along the ray (its "learned density")."""

    def __init__(self, width: int = 64, depth: int = 4, channels: int = 35, heads: int = 4, dropout: float = 0.1):
        super().__init__()
        self.rgbfeat_fc = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
        self.view_crosstrans = nn.ModuleList(ViewBlock(width, dropout) for _ in range(depth))
        self.view_selftrans = nn.ModuleList(RayBlock(width, heads, dropout) for _ in range(depth))
        self.q_fcs = nn.ModuleList(_query(width) if block % 2 == 0 else nn.Identity() for block in range(depth))
        self.norm = nn.LayerNorm(width)
        self.rgb_fc = nn.Linear(width, 3)

    def forward(
        self, seen: Seen, points: Float[Tensor, "R S 3"], direction: Float[Tensor, "R 3"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R S"]]:
        """Colour of each ray, and weights along it that sum to 1."""
        with torch.autocast(points.device.type, enabled=False):
            place = encode_position(points)
            heading = encode_position(F.normalize(direction.float(), dim=-1)).unsqueeze(1).expand_as(place)
        x = self.rgbfeat_fc(seen.values)
        q, weights = x.amax(dim=2), None
        last = len(self.view_crosstrans) - 1
        blocks = zip(self.view_crosstrans, self.q_fcs, self.view_selftrans, strict=True)
        for number, (view_block, query, ray_block) in enumerate(blocks):
            q = view_block(q, x, seen.ray_diff, seen.mask)
            if number % 2 == 0:
                q = query(torch.cat([q, place.to(q.dtype), heading.to(q.dtype)], dim=-1))
            q, weights = ray_block(q, want_weights=number == last)
        return self.rgb_fc(self.norm(q).mean(dim=1)), weights


def _query(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width + 63 + 63, width), nn.ReLU(), nn.Linear(width, width))
