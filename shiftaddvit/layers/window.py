"""The sizes of a convolution, shared by every layer that slides a window: shift, packed shift and adder."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Sizes as `nn.Conv2d` names them; zero padding."""

    in_channels: int
    """Of the picture that comes in."""
    out_channels: int
    """Of the picture that goes out."""
    kernel_size: Pair
    """Rows and columns."""
    stride: Pair = (1, 1)
    """Between windows."""
    padding: Pair = (0, 0)
    """Zeros on each side."""
    dilation: Pair = (1, 1)
    """Between the places of a window."""
    groups: int = 1
    """Groups of channels that do not see each other."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Window":
        """A convolution's. UserError for padding that is no number of zeros."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise UserError(f"padding must be a number of zeros, got padding={conv.padding!r}, padding_mode={conv.padding_mode!r}")
        return cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def convolve(self, x: Float[Tensor, "B in H W"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "B out H2 W2"]:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def __str__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel_size}, stride={self.stride}, padding={self.padding}{groups}"


class Windowed:
    """Gives a module with a `window` the attributes of `nn.Conv2d`."""

    window: Window

    def __getattr__(self, name: str) -> Any:
        if name in Window.__dataclass_fields__ and "window" in vars(self):
            return getattr(self.window, name)
        return super().__getattr__(name)
