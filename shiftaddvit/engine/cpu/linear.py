"""A linear layer, or a mixture of two, over rows."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..weights import Norm, Projection
from .onednn import float_linear, integer_linear, onednn, prepared_integers, prepared_linear

NARROW = 32
"""K·N/(K+N) below which a mixture computes both experts: there rows cost more to move than to multiply."""

WIDE = 96
"""Outputs from which a product in integers gains more than rounding its rows costs."""


@dataclass(frozen=True)
class Dense:
    """One matrix for all rows."""

    weight: Tensor
    """(in, out) for MKL, or in oneDNN's layout."""
    bias: Float[Tensor, "out"] | None
    """Added to every row."""
    how: str
    """The library."""

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None) -> "Dense":
        """By oneDNN where that is the faster."""
        bias = bias.to(weight.dtype) if bias is not None else None
        return cls(prepared_linear(weight), bias, "oneDNN") if onednn().linears else cls(weight.t(), bias, "MKL")

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        if self.how == "oneDNN":
            return float_linear(a, self.weight, self.bias, residual)
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
    """A mixture that widens as one product: [a·(1 − s), a·s, s] over the stacked experts, s being 1 where the second is chosen."""

    router: Float[Tensor, "in 2"]
    """As `routes` makes it."""
    product: Dense
    """First expert, second expert, difference of the biases."""

    @property
    def how(self) -> str:
        return f"{self.product.how}, both experts"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        return self.product(widened(a, self.router), residual)


@dataclass(frozen=True)
class Stacked:
    """A mixture that does not widen as one product, whose outputs are those of both experts and the router's."""

    product: Dense
    """First expert, second expert, router."""
    outputs: int
    """Of one expert."""

    @property
    def how(self) -> str:
        return f"{self.product.how}, both experts"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        y = selected(self.product(a), self.outputs)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class Partition:
    """A mixture whose rows are sorted by expert, so that each row is multiplied once."""

    router: Float[Tensor, "in 2"]
    """As `routes` makes it."""
    experts: tuple[Dense | Integer, Dense | Integer]
    """In the router's order."""

    @property
    def how(self) -> str:
        kinds = dict.fromkeys(expert.how for expert in self.experts)
        return f"{' and '.join(kinds)}, rows by expert"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        order, first = sorted_by_expert(second(a @ self.router))
        rows = a.index_select(0, order)
        parts = [expert(part) for expert, part in zip(self.experts, (rows[:first], rows[first:]), strict=True) if len(part)]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        # Gathering rows is several times as fast as scattering them.
        y = y.index_select(0, back)
        return y if residual is None else y.add_(residual)


Linear = Dense | Integer | Both | Stacked | Partition


def linear(projection: Projection, int8: bool = False) -> Linear:
    """How a projection that the fused ops compute runs here. With `int8`, matrices that are exact in eight bits and wide enough to be
    worth rounding their rows take integers."""
    if projection.router is not None and crossing(projection) < NARROW:
        outputs, inputs = projection.weight.shape[1:]
        if outputs > inputs:
            return Both(routes(projection.router, projection.weight.dtype).t(), Dense.of(*both_experts(projection)))
        return Stacked(Dense.of(*stacked_experts(projection)), outputs)
    experts = tuple(_expert(w, b, int8) for w, b in zip(projection.weight, biases(projection), strict=True))
    return experts[0] if projection.router is None else Partition(routes(projection.router, projection.weight.dtype).t(), experts)


def _expert(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, int8: bool) -> Dense | Integer:
    exact = eight_bits(weight) if int8 and len(weight) >= WIDE and onednn().integers else None
    if exact is None:
        return Dense.of(weight, bias)
    values, scale = exact
    return Integer(prepared_integers(values), scale, torch.zeros(len(scale), dtype=torch.int32), bias)


def widened(a: Float[Tensor, "M in"], router: Float[Tensor, "in 2"]) -> Float[Tensor, "M 2in+1"]:
    """The rows that the weight of `Both` takes."""
    width = a.shape[1]
    rows = a.new_empty(a.shape[0], 2 * width + 1)
    chosen = second(a @ router).to(a.dtype)
    rows[:, 2 * width] = chosen
    torch.mul(a, chosen.unsqueeze(1), out=rows[:, width : 2 * width])
    torch.sub(a, rows[:, width : 2 * width], out=rows[:, :width])
    return rows


def both_experts(projection: Projection) -> tuple[Float[Tensor, "out 2in+1"], Float[Tensor, "out"] | None]:
    """Weight and bias of `Both`."""
    first, other = projection.weight
    bias = biases(projection)
    step = bias[1] - bias[0] if projection.bias is not None else first.new_zeros(len(first))
    return torch.cat([first, other, step.to(first.dtype).unsqueeze(1)], dim=1), bias[0]


def stacked_experts(projection: Projection) -> tuple[Float[Tensor, "2out+2 in"], Float[Tensor, "2out+2"] | None]:
    """Weight and bias of `Stacked`."""
    bias = torch.cat([*projection.bias, projection.bias.new_zeros(2)]) if projection.bias is not None else None
    return torch.cat([*projection.weight, routes(projection.router, projection.weight.dtype)]), bias


def selected(y: Float[Tensor, "M 2out+2"], outputs: int) -> Float[Tensor, "M out"]:
    """The chosen expert's part of what the weight of `Stacked` gives."""
    return torch.where(second(y[:, 2 * outputs :]).unsqueeze(1), y[:, outputs : 2 * outputs], y[:, :outputs])


def routes(router: Float[Tensor, "2 in"], dtype: torch.dtype) -> Float[Tensor, "2 in"]:
    """Rows in `dtype` of which the second has the larger product where the second expert is chosen. In half precision they are
    the difference of the router's rows in two parts, which keep twice the digits and round only what is far from a tie."""
    if dtype == router.dtype:
        return router
    difference = router[1] - router[0]
    high = difference.to(dtype)
    return torch.stack([(high.float() - difference).to(dtype), high])


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


def biases(projection: Projection) -> list[Tensor | None]:
    """One an expert."""
    return list(projection.bias) if projection.bias is not None else [None] * len(projection.weight)


def second(products: Float[Tensor, "M 2"]) -> Bool[Tensor, "M"]:
    """Where the second expert is chosen, of rows multiplied by `routes`."""
    return products[:, 1] > products[:, 0]


def sorted_by_expert(chosen: Bool[Tensor, "M"]) -> tuple[Int[Tensor, "M"], int]:
    """Rows of the first expert, in order, then those of the second, and how many the first has."""
    order = torch.argsort(chosen, stable=True)
    return order, len(chosen) - int(chosen.sum())


def normalised(x: Float[Tensor, "*batch C"], norm: Norm | None) -> Float[Tensor, "M C"]:
    """Rows of LayerNorm(x)."""
    rows = x.reshape(-1, x.shape[-1])
    return F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps) if norm is not None else rows
