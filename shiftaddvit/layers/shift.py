"""The shift linear layer in its latent, trainable life (DeepShift-PS and -Q; ShiftAddViT section 4.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.numerics import exponent_range, fixed_point, quantize_ps, quantize_q
from shiftaddvit.numerics.power_of_two import channel_offset


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


class ShiftLinear(nn.Module):
    """y = x Wᵀ + b where every weight is zero or ±2^p. Trains its latent parameters; `weight` is the quantised matrix.

    With `enabled = False` the latent values are used unquantised, which reproduces the linear layer it came from. `model.half()` rounds
    latents, and with them some exponents: pack first for inference in half precision.
    """

    primitive = "shift"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.enabled = True
        if config.variant == "ps":
            self.shift = nn.Parameter(torch.zeros(out_features, in_features))
            self.sign = nn.Parameter(torch.zeros(out_features, in_features))
        else:
            self.latent = nn.Parameter(torch.zeros(out_features, in_features))
        self.register_buffer("offset", torch.zeros(out_features, 1, dtype=torch.int32) if config.channel_offset else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # Random latents of PS would round half the signs to zero, so a fresh layer starts from a linear layer's weights.
        self.inherit(nn.init.kaiming_uniform_(torch.empty(out_features, in_features), a=5**0.5))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: ShiftConfig = ShiftConfig()) -> "ShiftLinear":
        """The shift layer that starts from a pre-trained linear layer's weight and bias."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, config)
        layer = layer.to(device=linear.weight.device)
        layer.inherit(linear.weight)
        if linear.bias is not None:
            layer.bias.data.copy_(linear.bias.data)
        layer.train(linear.training)
        return layer

    @torch.no_grad()
    def inherit(self, weight: Float[Tensor, "out in"]) -> None:
        """Set the latents from a dense weight: s = log2 |w| (less the channel's offset), g = sign(w); w = 0 becomes g = 0."""
        if weight.is_meta:
            return  # shapes alone
        weight = weight.detach().float()
        if self.offset is not None:
            self.offset.copy_(channel_offset(weight, self.config.rounding))
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
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix in use: powers of two, or the latent values when the primitive is switched off."""
        if not self.enabled:
            return self.dense_weight()
        if self.config.variant == "ps":
            return quantize_ps(self.shift, self.sign, self.config.bits, self.config.rounding, self.offset)
        return quantize_q(self.latent, self.config.bits, self.config.rounding, self.offset, self.config.published_range)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        """The latent values, unquantised: what the layer inherited, or has since learned."""
        if self.config.variant == "q":
            return self.latent
        exponent = self.shift if self.offset is None else self.shift + self.offset
        return torch.exp2(exponent) * self.sign

    def latent_parameters(self) -> list[nn.Parameter]:
        """The parameters that weight decay must leave alone and that have a learning rate of their own."""
        return [self.shift, self.sign] if self.config.variant == "ps" else [self.latent]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        bias = self.bias
        if self.config.fixed_point and self.enabled:
            x = fixed_point(x)
            bias = fixed_point(bias) if bias is not None else None
        # The matrix is made in float32 from latents that conversion keeps there, whatever the model around computes in.
        return F.linear(x, self.weight.to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.config.variant}, bits={self.bits}"

