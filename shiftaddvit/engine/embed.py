"""Patch embeddings and the spatial reduction of keys and values: convolution, norm, class tokens and positions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.ops.layer_norm import layer_norm
from shiftaddvit.ops.patch_embed import flatten_weight, patch_embed

from .program import About, Launch
from .weights import Norm, Preparation, norm_of


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
        return About("patch_embed", f"{tokens}×{self.weight.shape[0]}", "mult", True)


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
) -> EmbedStep:
    """The step of a convolution and the norm behind it, over a picture (`planes`) or tokens of the grid `size`."""
    conv_name = f"{name}.proj" if planes or prefix is not None else name
    kernel, stride, padding = (_side(getattr(conv, field, None), conv_name, field) for field in ("kernel_size", "stride", "padding"))
    if type(conv) is not nn.Conv2d or conv.groups != 1 or _side(conv.dilation, conv_name, "dilation") != 1:
        raise UserError(f"the engine cannot lower {conv_name}: it takes an ordinary Conv2d, got {conv}; run the model itself")
    grid = tuple((side + 2 * padding - kernel) // stride + 1 for side in size)
    if min(grid) < 1:
        raise UserError(f"image_size is too small: {name} has {size[0]}×{size[1]} inputs and a {kernel}×{kernel} window")
    return EmbedStep(
        name, prep.matrix(flatten_weight(conv.weight.detach(), planes), conv_name), prep.vector(conv.bias), kernel, stride, padding,
        None if planes else size, grid, norm_of(norm, f"{name}.norm", prep), prep.vector(prefix), prep.vector(position),
    )  # fmt: skip


def _side(value: object, name: str, field: str) -> int:
    """The one value of both directions."""
    if not isinstance(value, tuple) or len(value) != 2 or value[0] != value[1] or not isinstance(value[0], int):
        raise UserError(f"the engine cannot lower {name}: {field} must be the same number in both directions, got {value!r}")
    return value[0]


def with_class_positions(position: Tensor, prefix: int) -> Float[Tensor, "tokens C"]:
    """Positions (tokens, C) of patches alone, with zeros for `prefix` tokens in front."""
    return torch.cat([position.new_zeros(prefix, position.shape[1]), position])
