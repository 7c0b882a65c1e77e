"""A linear layer, or a mixture of two, over rows."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..weights import Norm, Projection
from .onednn import integer_linear, onednn, prepared_integers

NARROW = 32
"""K·N/(K+N) below which a mixture computes both experts: there rows cost more to move than to multiply."""

WIDE = 96
"""Outputs from which a product in integers gains more than rounding its rows costs."""


@dataclass(frozen=True)
class Dense:
    """One matrix for all rows."""

    weight: Float[Tensor, "in out"]
    """Transposed view of the program's."""
    bias: Float[Tensor, "out"] | None
    """Added to every row."""
    how: str = "MKL"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        if residual is None:
            return a @ self.weight if self.bias is None else torch.addmm(self.bias, a, self.weight)
        y = torch.addmm(residual, a, self.weight)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class Integer:
    """One matrix whose values are exact in eight bits, over rows rounded to eight bits: the only error is that rounding."""

    weight: Tensor
    """int8, in oneDNN's layout."""
    scale: Float[Tensor, "out"]
    """Of a weight's unit in each output."""
    zeros: Int[Tensor, "out"]
    """Zero points of the weight."""
    bias: Float[Tensor, "out"] | None
    """Added to every row."""
    how: str = "oneDNN int8"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        # One scale for all rows, from their largest value, so nothing saturates. NaN and infinity make it NaN, and every output.
        largest = float(a.abs().amax())
        unit = largest / 127 if math.isfinite(largest) else math.nan
        rounded = torch.add(_MIDDLE, a, alpha=1 / unit if unit > 0 else 0.0).to(torch.uint8)
        y = integer_linear(rounded, unit, self.weight, self.scale, self.zeros, self.bias)
        return y if residual is None else y.add_(residual)


_MIDDLE = torch.tensor(128.5)
"""The code of zero, and a half for rounding where conversion cuts off."""


@dataclass(frozen=True)
class Both:
    """A narrow mixture as one product: [a·(1 − s), a·s, s] over the stacked experts, s being 1 where the second is chosen."""

    router: Float[Tensor, "in 2"]
    """Transposed."""
    weight: Float[Tensor, "2in+1 out"]
    """First expert, second expert, difference of the biases."""
    bias: Float[Tensor, "out"] | None
    """Of the first expert."""
    how: str = "MKL, both experts"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        return Dense(self.weight, self.bias)(self.operand(a), residual)

    def operand(self, a: Float[Tensor, "M in"]) -> Float[Tensor, "M 2in+1"]:
        """The rows that the stacked weight takes."""
        width = a.shape[1]
        rows = a.new_empty(a.shape[0], 2 * width + 1)
        chosen = second(a, self.router).to(a.dtype)
        rows[:, 2 * width] = chosen
        torch.mul(a, chosen.unsqueeze(1), out=rows[:, width : 2 * width])
        torch.sub(a, rows[:, width : 2 * width], out=rows[:, :width])
        return rows


@dataclass(frozen=True)
class Partition:
    """A mixture whose rows are sorted by expert, so that each row is multiplied once."""

    router: Float[Tensor, "in 2"]
    """Transposed."""
    experts: tuple[Dense | Integer, Dense | Integer]
    """In the router's order."""

    @property
    def how(self) -> str:
        kinds = dict.fromkeys(expert.how for expert in self.experts)
        return f"{' and '.join(kinds)}, rows by expert"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        order, first = sorted_by_expert(second(a, self.router))
        rows = a.index_select(0, order)
        parts = [expert(part) for expert, part in zip(self.experts, (rows[:first], rows[first:]), strict=True) if len(part)]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.empty_like(y).index_copy_(0, order, y) if residual is None else residual.index_add(0, order, y)


Linear = Dense | Integer | Both | Partition


def linear(projection: Projection, int8: bool = False) -> Linear:
    """How a projection that the fused ops compute runs here. With `int8`, matrices that are exact in eight bits and wide enough to be
    worth rounding their rows take integers."""
    if projection.router is not None and crossing(projection) < NARROW:
        return narrow(projection)
    experts = tuple(_expert(w, b, int8) for w, b in zip(projection.weight, biases(projection), strict=True))
    return experts[0] if projection.router is None else Partition(projection.router.t(), experts)


def _expert(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, int8: bool) -> Dense | Integer:
    exact = eight_bits(weight) if int8 and len(weight) >= WIDE and onednn().integers else None
    if exact is None:
        return Dense(weight.t(), bias)
    values, scale = exact
    return Integer(prepared_integers(values), scale, torch.zeros(len(scale), dtype=torch.int32), bias)


def eight_bits(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Float[Tensor, "out"]] | None:
    """(values, scale) with weight = values · scale[:, None] exactly and |values| ≤ 64, as four-bit codes have; None where there are none.

    64 and not 127: two products of a 255 and a 64 still fit the 16 bits into which processors without VNNI add pairs."""
    scale = weight.abs().amax(dim=1) / 64
    scale = torch.where(scale > 0, scale, 1.0)
    values = (weight / scale.unsqueeze(1)).round().to(torch.int8)
    return (values, scale) if torch.equal(values * scale.unsqueeze(1), weight) else None


def crossing(projection: Projection) -> float:
    """K·N/(K+N): products for each value read or written."""
    outputs, inputs = projection.weight.shape[1:]
    return inputs * outputs / (inputs + outputs)


def narrow(projection: Projection) -> Dense | Both:
    """One product, also for a mixture of two."""
    bias = biases(projection)
    if projection.router is None:
        return Dense(projection.weight[0].t(), bias[0])
    first, other = projection.weight
    step = bias[1] - bias[0] if projection.bias is not None else first.new_zeros(len(first))
    return Both(projection.router.t(), torch.cat([first.t(), other.t(), step.unsqueeze(0)]), bias[0])


def biases(projection: Projection) -> list[Tensor | None]:
    """One an expert."""
    return list(projection.bias) if projection.bias is not None else [None] * len(projection.weight)


def second(a: Float[Tensor, "M in"], router: Float[Tensor, "in 2"]) -> Bool[Tensor, "M"]:
    """Where the second expert has the larger logit."""
    logits = a @ router
    return logits[:, 1] > logits[:, 0]


def sorted_by_expert(chosen: Bool[Tensor, "M"]) -> tuple[Int[Tensor, "M"], int]:
    """Rows of the first expert, in order, then those of the second, and how many the first has."""
    order = torch.argsort(chosen, stable=True)
    return order, len(chosen) - int(chosen.sum())


def normalised(x: Float[Tensor, "*batch C"], norm: Norm | None) -> Float[Tensor, "M C"]:
    """Rows of LayerNorm(x)."""
    rows = x.reshape(-1, x.shape[-1])
    return F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps) if norm is not None else rows
