"""The steps of a rendered chunk: each a frozen set of weights and a pure function. `x` is what views see (V, RS, C), `q` the rays' tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.engine.program import Launch
from shiftaddvit.engine.weights import Norm, Projection
from shiftaddvit.ops.feed_forward import Feed, feed_forward
from shiftaddvit.ops.ray_output import ray_color, ray_weights
from shiftaddvit.ops.ray_query import ray_query
from shiftaddvit.ops.ray_transformer import ray_transformer
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


@dataclass(frozen=True)
class FusedWeights:
    """The first point's attention along the ray, from the queries and keys of the last block."""

    norm: Norm
    """Before the attention."""
    query: Tensor
    """(C, C)"""
    key: Tensor
    """(C, C)"""
    heads: int
    """Of the ray transformer."""
    codes: str
    """`softmax`, or how codes are made: `token`, `zero`, `float`."""
    low: float
    """What a code has where it is not 1."""

    fused = True

    def run(self, x: Float[Tensor, "R S C"], launch: Launch) -> Float[Tensor, "R S"]:
        return ray_weights(x, self.norm.pair, self.norm.eps, self.query, self.key, self.heads, self.codes, self.low, launch.backend)


@dataclass(frozen=True)
class ModuleWeights:
    """The same by its own layer in float32."""

    norm: Norm
    """Before the attention."""
    module: nn.Module
    """A copy."""

    fused = False

    def run(self, x: Float[Tensor, "R S C"], launch: Launch) -> Float[Tensor, "R S"]:
        return self.module(self.norm.run(x.float()), want_weights=True)[1].float()


@dataclass(frozen=True)
class Color:
    """The last norm, the mean over the ray, `rgb_fc`."""

    norm: Norm
    """Of the tokens."""
    weight: Tensor
    """(3, C), float32."""
    bias: Tensor
    """(3,), float32."""

    def run(self, x: Float[Tensor, "R S C"], launch: Launch) -> Float[Tensor, "R 3"]:
        return ray_color(x, self.norm.pair, self.norm.eps, self.weight, self.bias, launch.backend)


@dataclass(frozen=True)
class FusedRay:
    """Attention along the ray and its feed-forward in one kernel."""

    name: str
    """Module name of the attention in the model."""
    heads: int
    """Of queries, keys and values."""
    norm: Norm
    """Before the attention."""
    qkv: Tensor
    """(3C, C)"""
    proj: Tensor
    """(C, C)"""
    proj_bias: Tensor | None
    """(C,), float32."""
    feed: FusedFeedForward
    """After it."""
    form: str
    """Of `ray_transformer`."""
    low: float = 0.0
    """What a code has where it is not 1."""
    own: bool = True
    """Linear attention: ½ v."""
    context_mean: bool = True
    """Linear attention: divided by the number of points."""
    unit: bool = True
    """Linear attention: each head scaled to length one."""
    conv: Tensor | None = None
    """Linear attention: (heads, window), float32."""

    unfused = ()

    def run(self, x: Float[Tensor, "R S C"], launch: Launch) -> Float[Tensor, "R S C"]:
        return ray_transformer(
            x, self.heads, self.norm.pair, self.norm.eps, self.qkv, self.proj, self.proj_bias, self.feed.feed, self.feed.norm.eps, self.form,
            self.low, self.own, self.context_mean, self.unit, self.conv, launch.backend,
        )  # fmt: skip


@dataclass(frozen=True)
class SteppedRay:
    """Attention along the ray by the deployed engine's steps, rays as its batch, then the feed-forward."""

    attention: object
    """A step of `shiftaddvit.engine`."""
    feed: FusedFeedForward | ModuleFeedForward
    """After it."""

    @property
    def unfused(self) -> tuple[str, ...]:
        found = () if self.attention.about().fused else (self.attention.name,)
        return found if self.feed.fused else (*found, self.feed.name)

    def run(self, x: Float[Tensor, "R S C"], launch: Launch) -> Float[Tensor, "R S C"]:
        return self.feed.run(self.attention.run(x, launch), launch)


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
class Block:
    """A view transformer and a ray transformer."""

    views: Views
    """What the views say about each point."""
    query: Query | None
    """On even blocks."""
    ray: FusedRay | SteppedRay
    """What the points say to each other."""


@dataclass(frozen=True)
class RayProgram:
    """A lowered GNT."""

    look_up: LookUp
    """From points to what views see."""
    blocks: tuple[Block, ...]
    """In order."""
    weights: FusedWeights | ModuleWeights
    """Depth."""
    color: Color
    """RGB."""
    dtype: torch.dtype
    """Of activations and matrices."""
    feature_channels: int
    """Of the features it reads, padded."""
    notes: tuple[str, ...] = ()
    """What preparing the weights had to give up."""

    @torch.no_grad()
    def run(self, target: Target, launch: Launch = Launch()) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R"]]:
        """Colours and depths of the rays, float32."""
        x, geometry, q = self.look_up.run(target, launch)
        rays, samples = len(target.origin), len(target.depths)
        for block in self.blocks:
            q = block.views.run(q, x, geometry, launch)
            if block.query is not None:
                q = block.query.run(q, target, launch)
            before = q.view(rays, samples, -1)
            q = block.ray.run(before, launch).flatten(0, 1)
        weights = self.weights.run(before, launch)
        return self.color.run(q.view(rays, samples, -1), launch), weights @ target.depths

    @property
    def unfused(self) -> tuple[str, ...]:
        """Names of what runs as ordinary torch operations."""
        return tuple(name for block in self.blocks for part in (block.views, block.ray) for name in part.unfused)
