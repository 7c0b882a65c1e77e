"""Adder layers: L1 distances in place of inner products (AdderNet), and their cascade behind a shift layer (ShiftAddNet)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.ops.adder import adder_conv2d, adder_linear

from .shift import ShiftConfig, ShiftConv2d, ShiftLayer, ShiftLinear
from .window import Window, Windowed


@dataclass(frozen=True)
class AdderConfig:
    """How adder layers are normalised and trained."""

    norm: Literal["layer", "batch"] = "layer"
    """Behind each adder: over the channels of a token, which takes away what all its sums have in common; or AdderNet's batch norm."""
    eta: float = 0.2
    """Length of a weight's gradient in units of √numel (AdderNet's adaptive learning rate); 0 leaves the gradient as it is."""

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "batch"):
            raise ValueError(f"AdderConfig.norm must be 'layer' or 'batch', got {self.norm!r}")
        if self.eta < 0:
            raise ValueError(f"AdderConfig.eta must be 0 or positive, got {self.eta}")


class AdderLinear(nn.Module):
    """y_o = −Σ_k |W_ok − x_k|, in float32 under autocast too: half precision would round away what distinguishes two such sums.

    Gradients are AdderNet's (section 3): of W the full-precision difference, rescaled to η·√numel; of x the difference clamped to ±1.
    """

    primitive = "adder"

    def __init__(self, in_features: int, out_features: int, eta: float = 0.2):
        super().__init__()
        self.in_features, self.out_features, self.eta = in_features, out_features, eta
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        with torch.autocast(x.device.type, enabled=False):
            return adder_linear(x.float(), self.weight.float(), self.eta)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, eta={self.eta}"


class AdderConv2d(Windowed, nn.Module):
    """The same distance over the windows of a picture, whose padding takes part as zeros. UserError for groups and dilation, which
    the published layer does not have, and for sizes that differ between rows and columns."""

    primitive = "adder"

    def __init__(self, window: Window, eta: float = 0.2):
        super().__init__()
        if window.groups != 1 or window.dilation != (1, 1) or len({*window.stride}) > 1 or len({*window.padding}) > 1:
            raise UserError(f"an adder convolution takes one group, no dilation, and one stride and padding in both directions, got {window}")
        self.window, self.eta = window, eta
        self.weight = nn.Parameter(torch.randn(window.weight_shape))

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H2 W2"]:
        with torch.autocast(x.device.type, enabled=False):
            return adder_conv2d(x.float(), self.weight.float(), self.window.stride[0], self.window.padding[0], self.eta)

    def extra_repr(self) -> str:
        return f"{self.window}, eta={self.eta}"


class NormedAdder(nn.Module):
    """An adder and the norm that must follow it: its sums are large, negative and nearly equal.

    It starts from a dense layer's weight W and bias. For inputs larger than the weights −Σ|W − x| ≈ W sign(x) − ‖x‖₁, and the norm over
    channels takes ‖x‖₁ away; its scale starts from the lengths of W's rows, which is how much the dense layer's outputs vary for white
    inputs, and its shift from the bias. With `enabled = False` it is the dense layer.
    """

    def __init__(self, adder: AdderLinear | AdderConv2d, config: AdderConfig, bias: bool):
        super().__init__()
        self.adder, self.bias, self.enabled = adder, bias, True
        width = adder.weight.shape[0]
        self.norm = nn.LayerNorm(width) if config.norm == "layer" else nn.BatchNorm1d(width)

    @classmethod
    def from_dense(cls, dense: nn.Linear | nn.Conv2d, config: AdderConfig = AdderConfig()) -> "NormedAdder":
        """The adder layer that starts from a pre-trained linear layer or convolution. Its function is not inherited: only W is."""
        if isinstance(dense, nn.Conv2d):
            adder: AdderLinear | AdderConv2d = AdderConv2d(Window.of(dense), config.eta)
        else:
            adder = AdderLinear(dense.in_features, dense.out_features, config.eta)
        layer = cls(adder, config, dense.bias is not None).to(dense.weight.device).train(dense.training)
        with torch.no_grad():
            adder.weight.copy_(dense.weight)
            lengths = dense.weight.flatten(1).norm(dim=1)
            layer.norm.weight.copy_(lengths if config.norm == "batch" else lengths.square().mean().sqrt())
            if dense.bias is not None:
                layer.norm.bias.copy_(dense.bias)
        return layer

    @property
    def picture(self) -> bool:
        """Whether channels come before rows and columns."""
        return isinstance(self.adder, AdderConv2d)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.dense(x)
        y = self.adder(x)
        with torch.autocast(x.device.type, enabled=False):
            y = y.movedim(1, -1) if self.picture else y
            if isinstance(self.norm, nn.LayerNorm):
                y = F.layer_norm(y, self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)
            else:
                y = self.norm(y.flatten(0, -2).to(self.norm.weight.dtype)).view(y.shape)
        return (y.movedim(-1, 1) if self.picture else y).to(x.dtype)

    def dense(self, x: Tensor) -> Tensor:
        """The dense layer with this layer's weight and shift."""
        weight, bias = self.adder.weight, self.norm.bias
        return self.adder.window.convolve(x, weight, bias) if self.picture else F.linear(x, weight, bias)


class ShiftAdder(nn.Module):
    """ShiftAddNet's cascade: a shift layer, then an adder over the channels that come out of it (one place at a time in a convolution).

    The shift layer starts from the pre-trained weight. The adder starts from a diagonal c, the lengths of that weight's rows: behind the
    norm −Σ|c − y| then is |y_o| − |y_o − c_o|, an increasing function of each channel. With `enabled = False` there is no adder.
    """

    def __init__(self, shift: ShiftLayer, adder: NormedAdder):
        super().__init__()
        self.shift, self.adder, self.enabled = shift, adder, True

    @classmethod
    def from_dense(cls, dense: nn.Linear | nn.Conv2d, shift: ShiftConfig = ShiftConfig(), adder: AdderConfig = AdderConfig()) -> "ShiftAdder":
        """The cascade that starts from a pre-trained linear layer or convolution."""
        diagonal = torch.diag(dense.weight.detach().flatten(1).norm(dim=1))
        if isinstance(dense, nn.Conv2d):
            channels = dense.out_channels
            second: nn.Linear | nn.Conv2d = nn.Conv2d(channels, channels, 1, bias=False, device=dense.weight.device)
            first: ShiftLayer = ShiftConv2d.from_conv(dense, shift)
        else:
            second = nn.Linear(dense.out_features, dense.out_features, bias=False, device=dense.weight.device)
            first = ShiftLinear.from_linear(dense, shift)
        second.weight.data.copy_(diagonal.view_as(second.weight))
        return cls(first, NormedAdder.from_dense(second.train(dense.training), adder)).train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shift(x)
        return self.adder(y) if self.enabled else y


def adder_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of every adder inside, whose gradients have a length of their own."""
    return [module.weight for module in model.modules() if isinstance(module, (AdderLinear, AdderConv2d))]
