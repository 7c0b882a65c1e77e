"""Adder layers as parts of steps: L1 distances and their norm, in float32, alone or behind a shift layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.layers.adder import NormedAdder, ShiftAdder
from shiftaddvit.ops.adder import adder_conv2d, adder_linear

from .program import About, Launch
from .weights import Activation, Norm, Preparation, Projection, activate, projection


@dataclass(frozen=True)
class Affine:
    """Batch norm with its stored statistics: one scale and shift a channel."""

    weight: Float[Tensor, "C"]
    """Scale, float32."""
    bias: Float[Tensor, "C"]
    """Shift, float32."""

    def run(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        return (x.float() * self.weight + self.bias).to(x.dtype)


@dataclass(frozen=True)
class AdderProjection:
    """norm(−Σ|W − x|), in place of a `Projection`."""

    weight: Float[Tensor, "1 out in"]
    """float32."""
    after: Norm | Affine
    """The adder's own norm."""

    router, bias, fusable, fixed_point, primitives, primitive = None, None, False, (False,), ("adder",), "adder"

    def run(
        self,
        x: Float[Tensor, "*batch in"],
        launch: Launch,
        norm: Norm | None = None,
        residual: Float[Tensor, "*batch out"] | None = None,
        activation: Activation = "none",
    ) -> Float[Tensor, "*batch out"]:
        """residual + activation(norm(−Σ|W − x|)) in the dtype of x."""
        a = norm.run(x.float()) if norm else x.float()
        y = activate(self.after.run(adder_linear(a, self.weight[0], 0.0, launch.backend)), activation)
        return y.to(x.dtype) if residual is None else (y + residual).to(residual.dtype)


@dataclass(frozen=True)
class CascadeProjection:
    """An adder behind a shift layer, in place of a `Projection`."""

    shift: Projection
    """Computed first."""
    adder: AdderProjection
    """Computed on what comes out."""

    router, bias, fusable, fixed_point, primitives, primitive = None, None, False, (False,), ("shift+adder",), "shift+adder"

    @property
    def weight(self) -> Float[Tensor, "1 out in"]:
        """The shift layer's, whose sizes are those of the cascade."""
        return self.shift.weight

    def run(
        self,
        x: Float[Tensor, "*batch in"],
        launch: Launch,
        norm: Norm | None = None,
        residual: Float[Tensor, "*batch out"] | None = None,
        activation: Activation = "none",
    ) -> Float[Tensor, "*batch out"]:
        return self.adder.run(self.shift.run(x, launch, norm), launch, None, residual, activation)


@dataclass(frozen=True)
class WindowDistances:
    """norm(−Σ|W − x|) over the windows of a picture, as tokens."""

    weight: Float[Tensor, "out in k k"]
    """float32."""
    stride: int
    """In both directions."""
    padding: int
    """In both directions."""
    size: tuple[int, int] | None
    """Grid of incoming tokens; None for a picture."""
    grid: tuple[int, int]
    """Grid of outgoing tokens."""
    after: Norm | Affine
    """The adder's own norm."""

    primitive = "adder"

    def run(self, x: Tensor, launch: Launch) -> Float[Tensor, "B N out"]:
        picture = x.float() if self.size is None else x.float().transpose(1, 2).unflatten(2, self.size)
        y = adder_conv2d(picture.contiguous(), self.weight, self.stride, self.padding, 0.0, launch.backend)
        return self.after.run(y.flatten(2).transpose(1, 2)).to(x.dtype)


@dataclass(frozen=True)
class EmbedSequence:
    """Tokens of [LayerNorm](parts(x)), class tokens in front, positions added: an embedding that the fused kernel does not compute."""

    name: str
    """Module name in the model."""
    parts: tuple[WindowDistances | AdderProjection | object, ...]
    """Run in order: window distances, or a convolution (`EmbedStep`) with an adder behind it."""
    grid: tuple[int, int]
    """Grid of outgoing tokens."""
    norm: Norm | None
    """After the parts."""
    prefix: Float[Tensor, "P out"] | None
    """Class, distillation and register tokens."""
    position: Float[Tensor, "tokens out"] | None
    """Added to all tokens."""

    def run(self, x: Tensor, launch: Launch) -> Float[Tensor, "B N out"]:
        dtype = x.dtype
        for part in self.parts:
            x = part.run(x, launch)
        x = self.norm.run(x) if self.norm else x
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return (x if self.position is None else x.float() + self.position).to(dtype)

    def about(self) -> About:
        tokens = self.grid[0] * self.grid[1] + (len(self.prefix) if self.prefix is not None else 0)
        primitives = ", ".join(dict.fromkeys(part.primitive for part in self.parts))
        ops = " + ".join({"adder": "adder", "shift": "patch_embed"}[part.primitive] for part in self.parts)
        return About(f"{ops} + norm", f"{tokens}×{len(self.parts[-1].after.weight)}", primitives, False)


def adder_projection(module: NormedAdder, prep: Preparation, scale: Tensor | None = None) -> AdderProjection:
    """Prepare an adder layer over channels; `scale` (out,) multiplies its output (LayerScale)."""
    weight = module.adder.weight.detach().flatten(1).unsqueeze(0)
    return AdderProjection(prep.vector(weight), own_norm(module, prep, scale))


def own_norm(module: NormedAdder, prep: Preparation, scale: Tensor | None = None) -> Norm | Affine:
    """The norm behind an adder, ready to run."""
    norm = module.norm
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    if isinstance(norm, nn.BatchNorm1d):
        factor = weight * torch.rsqrt(norm.running_var.float() + norm.eps)
        weight, bias = factor, bias - norm.running_mean.float() * factor
    if scale is not None:
        weight, bias = weight * scale.to(weight), bias * scale.to(bias)
    weight, bias = prep.vector(weight), prep.vector(bias)
    return Affine(weight, bias) if isinstance(norm, nn.BatchNorm1d) else Norm(weight, bias, norm.eps)


AnyProjection = Projection | AdderProjection | CascadeProjection


def lower_projection(module: nn.Module, name: str, prep: Preparation, scale: Tensor | None = None) -> AnyProjection:
    """Prepare any linear-like layer: matrices and their mixtures as one `Projection`, adders as what they are. UserError for other layers."""
    if isinstance(module, NormedAdder) and module.enabled:
        return adder_projection(module, prep, scale)
    if isinstance(module, ShiftAdder) and module.enabled:
        return CascadeProjection(projection(module.shift, f"{name}.shift", prep), adder_projection(module.adder, prep, scale))
    return projection(module, name, prep, scale)
