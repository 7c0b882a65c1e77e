"""A copy of a model whose layers are plain products of constants, which every exporter understands."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import PackedShiftLinear, pack
from shiftaddvit.layers.shift import ShiftLinear
from shiftaddvit.numerics import fixed_point
from shiftaddvit.ops.matshift import formats


class FrozenLinear(nn.Module):
    """y = x Wᵀ + b with constants."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, rounds: bool):
        super().__init__()
        self.rounds = rounds
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(_round(x) if self.rounds else x, self.weight, self.bias)


class CodedLinear(nn.Module):
    """The same with the weight as codes of 4 or 5 bits, decoded inside the program by a table of 31 powers of two at most."""

    def __init__(self, layer: PackedShiftLinear):
        super().__init__()
        self.in_features, self.bits, self.rounds = layer.in_features, layer.bits, layer.config.fixed_point
        every_code = torch.arange(2**layer.bits, dtype=torch.uint8).reshape(1, -1)
        self.register_buffer("table", formats.decode(every_code, layer.bits).reshape(-1))
        self.register_buffer("codes", layer.codes.clone())
        self.register_buffer("scale", formats.channel_scale(layer.offset, layer.out_features).reshape(-1, 1))
        bias = fixed_point(layer.bias) if layer.bias is not None and self.rounds else layer.bias
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        weight = self.table[self._unpacked()] * self.scale
        return F.linear(_round(x) if self.rounds else x, weight, self.bias)

    def _unpacked(self) -> Int[Tensor, "out in"]:
        """`formats.unpack` in the few operations that exporters know: no shift of bytes, no empty slice."""
        out_features = self.codes.shape[0]
        groups = -(-self.in_features // formats.GROUP)
        packed = self.codes.to(torch.int32)
        low = packed[:, : groups * 4]
        codes = torch.stack([low % 16, low // 16], dim=-1).reshape(out_features, groups * formats.GROUP)
        if self.bits == 5:
            place = 2 ** torch.arange(formats.GROUP, dtype=torch.int32)
            signs = (packed[:, groups * 4 :].unsqueeze(-1) // place) % 2
            codes = codes + 16 * signs.reshape(out_features, groups * formats.GROUP)
        return codes[:, : self.in_features].long()


def frozen(model: nn.Module, packed: bool = False) -> nn.Module:
    """A float32 copy in evaluation mode with the function of `model` and no parameter that trains; `packed` keeps shift weights as codes.

    UserError for a shift layer whose bits cannot be packed, if `packed`.
    """
    model = deepcopy(model).eval().cpu().float()
    if packed:
        pack(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (ShiftLinear, PackedShiftLinear)):
            _replace(model, name, _constant(module, packed))
        elif isinstance(module, (MoELinear, MoEMlp)) and not module.enabled:
            _replace(model, name, module.experts[0])
    return model.requires_grad_(False)


def _constant(layer: ShiftLinear | PackedShiftLinear, packed: bool) -> nn.Module:
    if packed:
        return CodedLinear(layer)
    rounds = layer.config.fixed_point and getattr(layer, "enabled", True)
    bias = fixed_point(layer.bias) if rounds and layer.bias is not None else layer.bias
    return FrozenLinear(layer.weight, bias, rounds)


def _round(x: Tensor) -> Tensor:
    """`numerics.fixed_point` at 16.16 without its gradient, which exporters cannot see through."""
    return torch.clamp(torch.floor(x * 65536.0) * 2.0**-16, -(2.0**15), 2.0**15 - 2.0**-16)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not parent and not child:
        return
    setattr(model.get_submodule(parent), child, module)
