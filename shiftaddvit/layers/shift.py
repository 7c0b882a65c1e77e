"""Shift layers in their latent, trainable life: linear and convolution (DeepShift-PS and -Q; ShiftAddViT section 4.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.numerics import exponent_range, fixed_point, quantize_ps, quantize_q
from shiftaddvit.numerics.power_of_two import channel_offset

from .window import Window, Windowed


@dataclass(frozen=True)
class ShiftConfig:
    """How a weight becomes a signed power of two."""

    variant: Literal["ps", "q"] = "ps"
    """`ps` trains an exponent and a sign for each weight, `q` one latent weight that is quantised."""
    bits: int = 5
    """Bits of a code: sign, zero and exponents. 5 and 4 can be packed."""
    rounding: Literal["log", "value"] = "log"
    """Round the logarithm (as published) or to the nearest value."""
    channel_offset: bool = True
    """An integer exponent offset for each output channel, so that weights above one do not saturate."""
    fixed_point: bool = False
    """Round inputs and bias to 16.16 fixed point, as DeepShift published."""
    published_range: bool = False
    """DeepShift-Q's own exponent range, one wider than its bits hold; such a layer cannot be packed."""

    def __post_init__(self) -> None:
        if self.variant not in ("ps", "q"):
            raise ValueError(f"ShiftConfig.variant must be 'ps' or 'q', got {self.variant!r}")
        if self.rounding not in ("log", "value"):
            raise ValueError(f"ShiftConfig.rounding must be 'log' or 'value', got {self.rounding!r}")
        if self.published_range and self.variant != "q":
            raise ValueError("ShiftConfig.published_range is about variant 'q' only")
        exponent_range(self.bits)


class ShiftLayer(nn.Module):
    """What shift layers have in common: latent parameters of the weight's shape, output channels first, and the powers of two they stand for.

    `weight` is the quantised weight. With `enabled = False` the latent values are used unquantised, which reproduces the layer it came from.
    `model.half()` rounds latents, and with them some exponents: pack first for inference in half precision.
    """

    primitive = "shift"

    def __init__(self, shape: tuple[int, ...], bias: bool, config: ShiftConfig):
        super().__init__()
        self.config = config
        self.enabled = True
        if config.variant == "ps":
            self.shift = nn.Parameter(torch.zeros(shape))
            self.sign = nn.Parameter(torch.zeros(shape))
        else:
            self.latent = nn.Parameter(torch.zeros(shape))
        channels = (shape[0], *[1] * (len(shape) - 1))
        self.register_buffer("offset", torch.zeros(channels, dtype=torch.int32) if config.channel_offset else None)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        # Random latents of PS would round half the signs to zero, so a fresh layer starts from a dense layer's weights.
        self.inherit(nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))

    @torch.no_grad()
    def inherit(self, weight: Float[Tensor, "out *window"], bias: Float[Tensor, "out"] | None = None) -> None:
        """Set the latents from a dense weight: s = log2 |w| (less the channel's offset), g = sign(w); w = 0 becomes g = 0."""
        if weight.is_meta:
            return  # shapes alone
        weight = weight.detach().float()
        if bias is not None:
            self.bias.copy_(bias)
        if self.offset is not None:
            self.offset.copy_(channel_offset(weight.flatten(1), self.config.rounding).view_as(self.offset))
        if self.config.variant == "q":
            self.latent.copy_(weight)
            return
        low, _ = exponent_range(self.config.bits)
        shift = torch.where(weight == 0, float(low), weight.abs().clamp_min(1e-38).log2())
        self.shift.copy_(shift - self.offset if self.offset is not None else shift)
        self.sign.copy_(torch.sign(weight))

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def weight(self) -> Float[Tensor, "out *window"]:
        """The weight in use: powers of two, or the latent values when the primitive is switched off."""
        if not self.enabled:
            return self.dense_weight()
        if self.config.variant == "ps":
            return quantize_ps(self.shift, self.sign, self.config.bits, self.config.rounding, self.offset)
        return quantize_q(self.latent, self.config.bits, self.config.rounding, self.offset, self.config.published_range)

    def dense_weight(self) -> Float[Tensor, "out *window"]:
        """The latent values, unquantised: what the layer inherited, or has since learned."""
        if self.config.variant == "q":
            return self.latent
        exponent = self.shift if self.offset is None else self.shift + self.offset
        return torch.exp2(exponent) * self.sign

    def latent_parameters(self) -> list[nn.Parameter]:
        """The parameters that weight decay must leave alone and that have a learning rate of their own."""
        return [self.shift, self.sign] if self.config.variant == "ps" else [self.latent]

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias in the dtype of the input; input and bias on the 16.16 grid where the configuration says so.

        The weight is made in float32, whatever the model around computes in."""
        bias = self.bias
        if self.config.fixed_point and self.enabled:
            x = fixed_point(x)
            bias = fixed_point(bias) if bias is not None else None
        return x, self.weight.to(x.dtype), bias.to(x.dtype) if bias is not None else None


class ShiftLinear(ShiftLayer):
    """y = x Wᵀ + b where every weight is zero or ±2^p."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__((out_features, in_features), bias, config)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: ShiftConfig = ShiftConfig()) -> "ShiftLinear":
        """The shift layer that starts from a pre-trained linear layer's weight and bias."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, config)
        layer = layer.to(device=linear.weight.device)
        layer.inherit(linear.weight, linear.bias)
        layer.train(linear.training)
        return layer

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(*self.operands(x))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.config.variant}, bits={self.bits}"


class ShiftConv2d(Windowed, ShiftLayer):
    """A convolution whose every weight is zero or ±2^p; grouped and depthwise too. Zero padding."""

    def __init__(self, window: Window, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__(window.weight_shape, bias, config)
        self.window = window

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: ShiftConfig = ShiftConfig()) -> "ShiftConv2d":
        """The shift layer that starts from a pre-trained convolution's weight and bias. UserError for padding that is not of zeros."""
        layer = cls(Window.of(conv), conv.bias is not None, config)
        layer = layer.to(device=conv.weight.device)
        layer.inherit(conv.weight, conv.bias)
        layer.train(conv.training)
        return layer

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H2 W2"]:
        return self.window.convolve(*self.operands(x))

    def extra_repr(self) -> str:
        return f"{self.window}, bias={self.bias is not None}, {self.config.variant}, bits={self.bits}"
