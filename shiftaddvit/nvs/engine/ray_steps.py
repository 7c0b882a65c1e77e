"""The steps along a ray: attention with its feed-forward, the depth's weights, the colour."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.engine.program import Launch
from shiftaddvit.engine.weights import Norm
from shiftaddvit.ops.ray_output import ray_color, ray_weights
from shiftaddvit.ops.ray_transformer import ray_transformer

from .steps import FusedFeedForward, ModuleFeedForward


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
