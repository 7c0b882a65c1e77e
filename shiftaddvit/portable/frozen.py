"""A copy of a model whose layers are plain products of constants, which every exporter understands."""

from copy import deepcopy
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shiftaddvit.baselines.adder_attention import AdderScores
from shiftaddvit.layers.adder import AdderConv2d, AdderLinear
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import PackedShiftLayer, pack
from shiftaddvit.layers.shift import ShiftLayer
from shiftaddvit.layers.window import Window
from shiftaddvit.numerics import fixed_point
from shiftaddvit.ops.matshift import formats

_ROWS = 16
"""Output channels of an adder whose differences exist at a time."""


class FrozenShift(nn.Module):
    """A shift layer, linear or (with `window`) a convolution, whose weight is a constant."""

    def __init__(self, layer: ShiftLayer | PackedShiftLayer):
        super().__init__()
        self.window: Window | None = getattr(layer, "window", None)
        self.rounds = layer.config.fixed_point and getattr(layer, "enabled", True)
        bias = fixed_point(layer.bias) if self.rounds and layer.bias is not None else layer.bias
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)
        self._keep(layer)

    def _keep(self, layer: ShiftLayer | PackedShiftLayer) -> None:
        self.register_buffer("constant", layer.weight.detach().clone())

    def weight(self) -> Float[Tensor, "out *window"]:
        """The powers of two."""
        return self.constant

    def forward(self, x: Tensor) -> Tensor:
        x = _round(x) if self.rounds else x
        return F.linear(x, self.weight(), self.bias) if self.window is None else self.window.convolve(x, self.weight(), self.bias)


class CodedShift(FrozenShift):
    """The same with the weight as codes of 4 or 5 bits, decoded inside the program by a table of 32 values at most."""

    def _keep(self, layer: PackedShiftLayer) -> None:
        self.shape, self.bits = tuple(layer.shape), layer.bits
        every_code = torch.arange(2**layer.bits, dtype=torch.uint8).reshape(1, -1)
        self.register_buffer("table", formats.decode(every_code, layer.bits).reshape(-1))
        self.register_buffer("codes", layer.codes.clone())
        self.register_buffer("scale", formats.channel_scale(layer.offset, layer.shape[0]).reshape(-1, 1))

    def weight(self) -> Float[Tensor, "out *window"]:
        return (self.table[self._unpacked()] * self.scale).reshape(self.shape)

    def _unpacked(self) -> Int[Tensor, "out in"]:
        """`formats.unpack` in the few operations that exporters know: no shift of bytes, no empty slice."""
        out_features, in_features = self.shape[0], prod(self.shape[1:])
        groups = -(-in_features // formats.GROUP)
        packed = self.codes.to(torch.int32)
        low = packed[:, : groups * 4]
        codes = torch.stack([low % 16, low // 16], dim=-1).reshape(out_features, groups * formats.GROUP)
        if self.bits == 5:
            place = 2 ** torch.arange(formats.GROUP, dtype=torch.int32)
            signs = (packed[:, groups * 4 :].unsqueeze(-1) // place) % 2
            codes = codes + 16 * signs.reshape(out_features, groups * formats.GROUP)
        return codes[:, :in_features].long()


class FrozenAdderLinear(AdderLinear):
    """−Σ |W − x| in subtractions and sums that every runtime has."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return _distance(x, self.weight)


class FrozenAdderConv2d(AdderConv2d):
    """The same over windows, which are cut out by slices."""

    def forward(self, x: Float[Tensor, "B in H W"]) -> Float[Tensor, "B out H2 W2"]:
        (up, left), (down, right), (height, width) = self.window.padding, self.window.stride, self.window.kernel_size
        x = F.pad(x, (left, left, up, up))
        rows, columns = (x.shape[2] - height) // down + 1, (x.shape[3] - width) // right + 1
        places = [(i, j) for i in range(height) for j in range(width)]
        taps = [x[:, :, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right] for i, j in places]
        return _distance(torch.stack(taps, dim=2).flatten(1, 2).movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)


class FrozenScores(nn.Module):
    """−‖q_i − k_j‖₁, one channel after the other."""

    def forward(self, q: Float[Tensor, "B h N d"], k_turned: Float[Tensor, "B h d M"]) -> Float[Tensor, "B h N M"]:
        steps = (q[..., c : c + 1] - k_turned[..., c : c + 1, :] for c in range(q.shape[-1]))
        return -sum(step.abs() for step in steps)


def frozen(model: nn.Module, packed: bool = False) -> nn.Module:
    """A float32 copy in evaluation mode with the function of `model` and no parameter that trains; `packed` keeps shift weights as codes.

    UserError for a shift layer whose bits cannot be packed, if `packed`.
    """
    model = deepcopy(model).eval().cpu().float()
    if packed:
        model = pack(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (ShiftLayer, PackedShiftLayer)):
            model = _replaced(model, name, CodedShift(module) if packed else FrozenShift(module))
        elif isinstance(module, (AdderLinear, AdderConv2d)):
            model = _replaced(model, name, _adder(module))
        elif isinstance(module, AdderScores):
            model = _replaced(model, name, FrozenScores())
        elif isinstance(module, (MoELinear, MoEMlp)) and not module.enabled:
            model = _replaced(model, name, module.experts[0])
    return model.requires_grad_(False)


def _adder(layer: AdderLinear | AdderConv2d) -> FrozenAdderLinear | FrozenAdderConv2d:
    made = FrozenAdderConv2d(layer.window) if isinstance(layer, AdderConv2d) else FrozenAdderLinear(layer.in_features, layer.out_features)
    made.weight = layer.weight
    return made


def _distance(x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    return torch.cat([-(x.unsqueeze(-2) - rows).abs().sum(-1) for rows in weight.split(_ROWS)], dim=-1)


def _round(x: Tensor) -> Tensor:
    """`numerics.fixed_point` at 16.16 without its gradient, which exporters cannot see through."""
    return torch.clamp(torch.floor(x * 65536.0) * 2.0**-16, -(2.0**15), 2.0**15 - 2.0**-16)


def _replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model
