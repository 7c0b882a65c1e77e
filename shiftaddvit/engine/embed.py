"""Patch embeddings and the spatial reduction of keys and values: convolution, norm, class tokens and positions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.adder import NormedAdder, ShiftAdder
from shiftaddvit.ops.layer_norm import layer_norm
from shiftaddvit.ops.patch_embed import flatten_weight, patch_embed

from .adder import EmbedSequence, WindowDistances, adder_projection, own_norm
from .program import About, Launch
from .weights import Norm, Preparation, convolution, norm_of


@dataclass(frozen=True)
class EmbedStep:
    """Tokens of [LayerNorm](conv(x)), class tokens in front, positions added."""

    name: str
    """Module name in the model."""
    weight: Float[Tensor, "out flat"]
    """The convolution, in the order that the layout of x needs."""
    bias: Float[Tensor, "out"] | None
    """float32."""
    kernel: int
    """Side of the convolution's window."""
    stride: int
    """In both directions."""
    padding: int
    """In both directions."""
    size: tuple[int, int] | None
    """Grid of incoming tokens; None for a picture."""
    grid: tuple[int, int]
    """Grid of outgoing tokens."""
    norm: Norm | None
    """After the convolution."""
    prefix: Float[Tensor, "P out"] | None = None
    """Class, distillation and register tokens."""
    position: Float[Tensor, "tokens out"] | None = None
    """Position embeddings of all tokens."""
    primitive: str = "mult"
    """What the convolution's products are."""

    def run(self, x: Tensor, launch: Launch) -> Float[Tensor, "B N C"]:
        return patch_embed(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.size,
            self.kernel,
            self.norm.pair if self.norm else None,
            self.norm.eps if self.norm else 0.0,
            self.prefix,
            self.position,
            launch.pdl,
            launch.backend,
        )

    def about(self) -> About:
        tokens = self.grid[0] * self.grid[1] + (len(self.prefix) if self.prefix is not None else 0)
        return About("patch_embed", f"{tokens}×{self.weight.shape[0]}", self.primitive, True)


@dataclass(frozen=True)
class NormStep:
    """A LayerNorm that no product could take along."""

    name: str
    """Module name in the model."""
    norm: Norm
    """Its parameters."""

    def run(self, x: Float[Tensor, "B N C"], launch: Launch) -> Float[Tensor, "B N C"]:
        return layer_norm(x, *self.norm.pair, self.norm.eps, pdl=launch.pdl, backend=launch.backend)

    def about(self) -> About:
        return About("layer_norm", f"…×{len(self.norm.weight)}", "-", True)


def lower_embed(
    conv: nn.Module,
    norm: nn.Module | None,
    name: str,
    size: tuple[int, int],
    planes: bool,
    prep: Preparation,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> EmbedStep | EmbedSequence:
    """The step of a convolution and the norm behind it, over a picture (`planes`) or tokens of the grid `size`."""
    conv_name = f"{name}.proj" if planes or prefix is not None else name
    after = norm_of(norm, f"{name}.norm", prep)
    if isinstance(conv, ShiftAdder) and conv.enabled:
        first = _embed_step(conv.shift, None, conv_name, size, planes, prep)
        parts = (first, adder_projection(conv.adder, prep))
        return EmbedSequence(name, parts, first.grid, after, prep.vector(prefix), prep.vector(position))
    if isinstance(conv, NormedAdder) and conv.enabled:
        window = conv.adder.window
        stride, padding = window.stride[0], window.padding[0]
        grid = _grid(name, size, window.kernel_size, stride, padding)
        part = WindowDistances(prep.vector(conv.adder.weight), stride, padding, None if planes else size, grid, own_norm(conv, prep))
        return EmbedSequence(name, (part,), grid, after, prep.vector(prefix), prep.vector(position))
    return _embed_step(conv, after, conv_name, size, planes, prep, prefix, position, name)


def _embed_step(
    conv: nn.Module, norm: Norm | None, conv_name: str, size: tuple[int, int], planes: bool, prep: Preparation,
    prefix: Tensor | None = None, position: Tensor | None = None, name: str = "",
) -> EmbedStep:  # fmt: skip
    form = "an ordinary or a shift convolution"
    weight, bias, primitive = convolution(conv, conv_name, form)
    kernel, stride, padding = (_side(getattr(conv, field), conv_name, field) for field in ("kernel_size", "stride", "padding"))
    if conv.groups != 1 or _side(conv.dilation, conv_name, "dilation") != 1:
        raise UserError(f"the engine cannot lower {conv_name}: it takes {form} without groups and dilation, got {conv}; run the model itself")
    grid = _grid(name or conv_name, size, (kernel, kernel), stride, padding)
    return EmbedStep(
        name or conv_name, prep.matrix(flatten_weight(weight, planes), conv_name), prep.vector(bias), kernel, stride, padding,
        None if planes else size, grid, norm, prep.vector(prefix), prep.vector(position), primitive,
    )  # fmt: skip


def _grid(name: str, size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int) -> tuple[int, int]:
    grid = tuple((side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel, strict=True))
    if min(grid) < 1:
        raise UserError(f"image_size is too small: {name} has {size[0]}×{size[1]} inputs and a {kernel[0]}×{kernel[1]} window")
    return grid


def _side(value: object, name: str, field: str) -> int:
    """The one value of both directions."""
    if not isinstance(value, tuple) or len(value) != 2 or value[0] != value[1] or not isinstance(value[0], int):
        raise UserError(f"the engine cannot lower {name}: {field} must be the same number in both directions, got {value!r}")
    return value[0]


def with_class_positions(position: Tensor, prefix: int) -> Float[Tensor, "tokens C"]:
    """Positions (tokens, C) of patches alone, with zeros for `prefix` tokens in front."""
    return torch.cat([position.new_zeros(prefix, position.shape[1]), position])
