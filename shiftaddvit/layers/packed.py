"""Shift layers whose weights are integer codes: the same function as the latent layer, bit for bit, in a fifth of the space or less."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.numerics import fixed_point
from shiftaddvit.ops.matshift import formats

from .shift import ShiftConfig, ShiftLinear


class PackedShiftLinear(nn.Module):
    """y = x Wᵀ + b with W decoded from `codes` (out, bytes) and the channels' `offset`. It does not train.

    The decoded matrix is kept for the reference path (`weight`, not part of the state); the engine reads the codes.
    """

    primitive = "shift"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: ShiftConfig = ShiftConfig()):
        super().__init__()
        if config.bits not in (4, 5) or config.published_range:
            raise UserError(
                f"a shift layer of {config.bits} bits{' in the published range of DeepShift-Q' if config.published_range else ''} "
                "cannot be packed: 4 or 5 bits with one state for zero can"
            )
        self.in_features, self.out_features, self.config = in_features, out_features, config
        width = formats.packed_bytes(in_features, config.bits)
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("offset", torch.zeros(out_features, 1, dtype=torch.int8) if config.channel_offset else None)
        self.register_buffer("weight", torch.zeros(out_features, in_features), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.register_load_state_dict_post_hook(_decode_again)

    @classmethod
    def from_shift(cls, layer: ShiftLinear) -> "PackedShiftLinear":
        """Pack a latent layer; exact."""
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, layer.config).to(layer.weight.device)
        codes = formats.encode(layer.weight.detach(), layer.bits, layer.offset)
        packed.codes.copy_(formats.pack(codes, layer.bits))
        if layer.offset is not None:
            packed.offset.copy_(layer.offset)
        if layer.bias is not None:
            packed.bias.data.copy_(layer.bias.data)
        packed.refresh()
        return packed.train(layer.training)

    @property
    def bits(self) -> int:
        return self.config.bits

    def integer_codes(self) -> UInt8[Tensor, "out in"]:
        """One code a weight, unpacked."""
        return formats.unpack(self.codes, self.bits, self.in_features)

    def refresh(self) -> None:
        """Decode the weight again after the codes changed."""
        self.weight = formats.decode(self.integer_codes(), self.bits, self.offset, torch.float32)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        bias = self.bias
        if self.config.fixed_point:
            x = fixed_point(x)
            bias = fixed_point(bias) if bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}, packed"


def _decode_again(layer: PackedShiftLinear, _incompatible_keys: object) -> None:
    layer.refresh()


def is_packed(model: nn.Module) -> bool:
    """Whether the model holds a packed layer, so that it no longer trains."""
    return any(isinstance(module, PackedShiftLinear) for module in model.modules())


def pack(model: nn.Module) -> nn.Module:
    """Swap every latent shift layer inside `model` for its packed form, in place; the model is returned. Of a shift layer itself, its
    packed form is returned."""
    if isinstance(model, ShiftLinear):
        return PackedShiftLinear.from_shift(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, ShiftLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedShiftLinear.from_shift(module))
    return model
