"""Shift layers whose weights are integer codes: the same function as the latent layer, bit for bit, in a fifth of the space or less."""

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.numerics import fixed_point
from shiftaddvit.ops.matshift import formats

from .shift import ShiftConfig, ShiftConv2d, ShiftLayer, ShiftLinear
from .window import Window, Windowed


class PackedShiftLayer(nn.Module):
    """What packed layers have in common: `codes` (out, bytes) of each output channel's weights in a row, and the channels' `offset`.

    The decoded weight is kept for the reference path (`weight`, not part of the state); the engine reads the codes. It does not train.
    """

    primitive = "shift"

    def __init__(self, shape: tuple[int, ...], bias: bool, config: ShiftConfig):
        super().__init__()
        if config.bits not in (4, 5) or config.published_range:
            raise UserError(
                f"a shift layer of {config.bits} bits{' in the published range of DeepShift-Q' if config.published_range else ''} "
                "cannot be packed: 4 or 5 bits with one state for zero can"
            )
        self.config, self.shape = config, shape
        width = formats.packed_bytes(prod(shape[1:]), config.bits)
        self.register_buffer("codes", torch.zeros(shape[0], width, dtype=torch.uint8))
        self.register_buffer("offset", torch.zeros(shape[0], 1, dtype=torch.int8) if config.channel_offset else None)
        self.register_buffer("weight", torch.zeros(shape), persistent=False)
        self.bias = nn.Parameter(torch.zeros(shape[0]), requires_grad=False) if bias else None
        self.register_load_state_dict_post_hook(_decode_again)

    def take(self, layer: ShiftLayer) -> None:
        """Pack a latent layer's weight; exact."""
        offset = layer.offset.flatten(1) if layer.offset is not None else None
        codes = formats.encode(layer.weight.detach().flatten(1), layer.bits, offset)
        self.codes.copy_(formats.pack(codes, layer.bits))
        if layer.offset is not None:
            self.offset.copy_(offset)
        if layer.bias is not None:
            self.bias.data.copy_(layer.bias.data)
        self.refresh()
        self.train(layer.training)

    @property
    def bits(self) -> int:
        return self.config.bits

    def integer_codes(self) -> UInt8[Tensor, "out in"]:
        """One code a weight, unpacked; a convolution's window is flattened."""
        return formats.unpack(self.codes, self.bits, prod(self.shape[1:]))

    def refresh(self) -> None:
        """Decode the weight again after the codes changed."""
        self.weight = formats.decode(self.integer_codes(), self.bits, self.offset, torch.float32).view(self.shape)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias in the dtype of the input; input and bias on the 16.16 grid where the configuration says so.

        The weight is made in float32, whatever the model around computes in."""
        bias = self.bias
        if self.config.fixed_point:
            x = fixed_point(x)
            bias = fixed_point(bias) if bias is not None else None
        return x, self.weight.to(x.dtype), bias.to(x.dtype) if bias is not None else None


class PackedShiftLinear(PackedShiftLayer):
    """y = x Wᵀ + b with W decoded from codes."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__((out_features, in_features), bias, config)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_shift(cls, layer: ShiftLinear) -> "PackedShiftLinear":
        """The packed form of a latent layer; exact."""
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, layer.config).to(layer.weight.device)
        packed.take(layer)
        return packed

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(*self.operands(x))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}, packed"


class PackedShiftConv2d(Windowed, PackedShiftLayer):
    """A convolution with its weight decoded from codes."""

    def __init__(self, window: Window, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__(window.weight_shape, bias, config)
        self.window = window

    @classmethod
    def from_shift(cls, layer: ShiftConv2d) -> "PackedShiftConv2d":
        """The packed form of a latent layer; exact."""
        packed = cls(layer.window, layer.bias is not None, layer.config).to(layer.weight.device)
        packed.take(layer)
        return packed

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H2 W2"]:
        return self.window.convolve(*self.operands(x))

    def extra_repr(self) -> str:
        return f"{self.window}, bias={self.bias is not None}, bits={self.bits}, packed"


def _decode_again(layer: PackedShiftLayer, _incompatible_keys: object) -> None:
    layer.refresh()


def is_packed(model: nn.Module) -> bool:
    """Whether the model holds a packed layer, so that it no longer trains."""
    return any(isinstance(module, PackedShiftLayer) for module in model.modules())


def pack(model: nn.Module) -> nn.Module:
    """Swap every latent shift layer inside `model` for its packed form, in place; the model is returned. Of a shift layer itself, its
    packed form is returned."""
    if isinstance(model, ShiftLayer):
        return _packed(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, ShiftLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _packed(module))
    return model


def _packed(layer: ShiftLayer) -> PackedShiftLayer:
    return PackedShiftConv2d.from_shift(layer) if isinstance(layer, ShiftConv2d) else PackedShiftLinear.from_shift(layer)
