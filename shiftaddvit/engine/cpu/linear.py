"""A linear layer, or a mixture of two, over rows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..weights import Norm, Projection

NARROW = 32
"""K·N/(K+N) below which a mixture computes both experts: there rows cost more to move than to multiply."""


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
    experts: tuple[Dense, Dense]
    """In the router's order."""

    @property
    def how(self) -> str:
        kinds = dict.fromkeys(expert.how for expert in self.experts)
        return f"{' and '.join(kinds)}, rows by expert"

    def __call__(self, a: Float[Tensor, "M in"], residual: Float[Tensor, "M out"] | None = None) -> Float[Tensor, "M out"]:
        order, first = sorted_by_expert(second(a, self.router))
        rows = a.index_select(0, order)
        parts = [expert(part) for expert, part in zip(self.experts, (rows[:first], rows[first:]), strict=True) if len(part)]
        y = parts[0].new_empty(len(a), parts[0].shape[1]) if residual is None else residual.clone()
        for part, index in zip(parts, (order[:first], order[first:]) if len(parts) == 2 else (order,), strict=True):
            y = y.index_copy_(0, index, part) if residual is None else y.index_add_(0, index, part)
        return y


Linear = Dense | Both | Partition


def crossing(projection: Projection) -> float:
    """K·N/(K+N): products for each value read or written."""
    outputs, inputs = projection.weight.shape[1:]
    return inputs * outputs / (inputs + outputs)


def linear(projection: Projection) -> Linear:
    """How a projection that the fused ops compute runs here."""
    if projection.router is None or crossing(projection) < NARROW:
        return narrow(projection)
    experts = tuple(Dense(w.t(), b) for w, b in zip(projection.weight, biases(projection), strict=True))
    return Partition(projection.router.t(), experts)


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
