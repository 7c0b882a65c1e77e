"""The steps over points and what views see of them: each a frozen set of weights and a pure function. `x` is what views see (V, RS, C),
`q` the rays' tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.engine.program import Launch
from shiftaddvit.engine.weights import Norm, Projection
from shiftaddvit.ops.feed_forward import Feed, feed_forward
from shiftaddvit.ops.ray_query import ray_query
from shiftaddvit.ops.view_attention import view_attention
from shiftaddvit.ops.view_lookup import view_lookup

from ..gnt.transformer import encode_position


class Target(NamedTuple):
    """The rays of a chunk and what they look at, as the kernels read it."""

    origin: Float[Tensor, "R 3"]
    direction: Float[Tensor, "R 3"]
    depths: Float[Tensor, "S"]
    project: Float[Tensor, "V 3 4"]
    centre: Float[Tensor, "V 3"]
    images: Float[Tensor, "V H W 4"]
    features: Float[Tensor, "V h w F"]


@dataclass(frozen=True)
class LookUp:
    """`rgbfeat_fc` of what the views see."""

    weights: tuple[Tensor, ...]
    """color_weight, feature_weight, bias, out_weight, out_bias of `view_lookup`."""

    def run(self, target: Target, launch: Launch) -> tuple[Tensor, Tensor, Tensor]:
        """x (V, RS, C), geometry (V, RS, 8), the first query (RS, C)."""
        return view_lookup(*target, *self.weights, backend=launch.backend)


@dataclass(frozen=True)
class FusedFeedForward:
    """x + fc2(relu(fc1(norm(x)))) in one kernel."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Before the first linear."""
    fc1: Projection
    """One expert or two."""
    fc2: Projection
    """Likewise."""

    fused = True

    def run(self, x: Float[Tensor, "*n C"], launch: Launch) -> Float[Tensor, "*n C"]:
        return feed_forward(x, self.feed, self.norm.eps, launch.backend)

    @property
    def feed(self) -> Feed:
        """The same weights as the ops take them."""
        first, second = self.fc1, self.fc2
        return Feed(*self.norm.pair, first.weight, first.bias, second.weight, second.bias, first.router, second.router)


@dataclass(frozen=True)
class ModuleFeedForward:
    """The same by its own layer in float32."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Before it."""
    module: nn.Module
    """A copy."""

    fused = False

    def run(self, x: Float[Tensor, "*n C"], launch: Launch) -> Float[Tensor, "*n C"]:
        return (x.float() + self.module(self.norm.run(x.float()))).to(x.dtype)


@dataclass(frozen=True)
class FoldedViews:
    """View attention multiplied out."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Of the query."""
    weights: dict[str, Tensor]
    """Of `fold`."""

    fused = True

    def run(
        self, q: Float[Tensor, "RS C"], x: Tensor, geometry: Tensor, launch: Launch, feed: FusedFeedForward | None = None
    ) -> Float[Tensor, "RS C"]:
        """With `feed`, through the block's feed-forward too, in the same kernel."""
        more = {} if feed is None else {"feed": feed.feed, "feed_eps": feed.norm.eps}
        return view_attention(q, x, geometry, self.norm.pair, self.norm.eps, **self.weights, **more, backend=launch.backend)


@dataclass(frozen=True)
class ModuleViews:
    """View attention by its own layer in float32, where its linears cannot be multiplied out."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Of the query."""
    module: nn.Module
    """A copy."""

    fused = False

    def run(self, q: Float[Tensor, "RS C"], x: Tensor, geometry: Tensor, launch: Launch) -> Float[Tensor, "RS C"]:
        seen, where = x.transpose(0, 1).unsqueeze(1).float(), geometry.transpose(0, 1).unsqueeze(1).float()
        a = self.norm.run(q.float()).unsqueeze(1)
        return (q.float() + self.module(a, seen, where[..., :4], where[..., 4:5])[:, 0]).to(q.dtype)


@dataclass(frozen=True)
class Views:
    """A view transformer: in one kernel where both parts have one."""

    attention: FoldedViews | ModuleViews
    """Subtraction attention."""
    feed: FusedFeedForward | ModuleFeedForward
    """After it."""

    @property
    def unfused(self) -> tuple[str, ...]:
        return tuple(part.name for part in (self.attention, self.feed) if not part.fused)

    def run(self, q: Float[Tensor, "RS C"], x: Tensor, geometry: Tensor, launch: Launch) -> Float[Tensor, "RS C"]:
        if not self.unfused:
            return self.attention.run(q, x, geometry, launch, self.feed)
        return self.feed.run(self.attention.run(q, x, geometry, launch), launch)


@dataclass(frozen=True)
class Query:
    """`q_fcs` of an even block."""

    name: str
    """Module name in the model."""
    query_weight: Tensor
    """(C, C)"""
    place_weight: Tensor
    """(C, 64): 63 and a zero."""
    heading_weight: Tensor
    """(C, 63), float32."""
    bias: Tensor
    """(C,) of the first linear, float32."""
    out_weight: Tensor
    """(C, C)"""
    out_bias: Tensor
    """(C,)"""

    fused = True

    def run(self, q: Float[Tensor, "RS C"], target: Target, launch: Launch) -> Float[Tensor, "RS C"]:
        heading = F.linear(encode_position(F.normalize(target.direction, dim=-1)), self.heading_weight, self.bias)
        return ray_query(
            q, target.origin, target.direction, target.depths, self.query_weight, self.place_weight, heading, self.out_weight, self.out_bias,
            launch.backend,
        )  # fmt: skip
