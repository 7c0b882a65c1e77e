"""MLPs: with a depthwise convolution inside as a chain in oneDNN's own layout, plain, or routed as a whole."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..mlp import ConvMlpStep, MlpStep, RoutedMlpStep
from ..weights import Activation, activate
from .linear import (
    Dense, Linear, biases, both_experts, crossing, linear, normalised, routes, second, selected, sorted_by_expert, stacked_experts, widened,
)  # fmt: skip
from .onednn import convolve_blocked, convolve_tokens, onednn, packed, to_blocked, tokens_of

BLOCKED = 64
"""K·N/(K+N) of fc1 below which a plain MLP stays in oneDNN's layout."""
BLOCKED_MIXTURE = 32
"""Likewise for one with a mixture, which there computes both experts."""


@dataclass(frozen=True)
class BlockedConvMlp:
    """x + fc2(GELU(conv3×3(fc1(norm(x))))) as a chain in oneDNN's own layout, in which its depthwise convolution is three times as fast
    as over tokens. For narrow MLPs: a wide one spends its time in products, where MKL is as fast, and whose mixtures sort their rows."""

    step: ConvMlpStep
    """Its parameters."""
    router: Float[Tensor, "in 2"] | None
    """Of fc1, as `routes` makes it; None for one expert."""
    convolutions: tuple[tuple[Tensor, Tensor | None], ...]
    """Weight and bias, opaque: fc1 as in `Both`, depthwise, fc2 as in `Stacked`."""

    @classmethod
    def of(cls, step: ConvMlpStep) -> "BlockedConvMlp":
        router = routes(step.fc1.router, step.fc1.weight.dtype).t() if step.fc1.router is not None else None
        fc1 = both_experts(step.fc1) if step.fc1.router is not None else (step.fc1.weight[0], biases(step.fc1)[0])
        fc2 = stacked_experts(step.fc2) if step.fc2.router is not None else (step.fc2.weight[0], biases(step.fc2)[0])
        convolutions = ((*fc1, 1), (step.conv.t(), step.conv_bias, 3), (*fc2, 1))
        return cls(step, router, tuple((_filters(weight, side), _opaque(bias)) for weight, bias, side in convolutions))

    @property
    def how(self) -> str:
        mixture = self.router is not None or self.step.fc2.router is not None
        return f"oneDNN blocked{', both experts' if mixture else ''}"

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        step, (fc1, depthwise, fc2) = self.step, self.convolutions
        a = normalised(x, step.norm)
        a = widened(a, self.router) if self.router is not None else a
        h = convolve_blocked(to_blocked(a.unflatten(0, (len(x), -1)), step.grid), *fc1, 0, 1)
        h = F.gelu(convolve_blocked(h, *depthwise, 1, len(step.conv_bias)))
        y = tokens_of(convolve_blocked(h, *fc2, 0, 1)).flatten(0, 1)
        return (selected(y, x.shape[-1]) if step.fc2.router is not None else y).view(x.shape).add_(x)


@dataclass(frozen=True)
class ConvMlp:
    """x + fc2(GELU(conv3×3(fc1(norm(x))))) over tokens."""

    step: ConvMlpStep
    """Its parameters."""
    fc1: Linear
    """Over rows."""
    filters: Float[Tensor, "hidden 1 3 3"]
    """Packed for oneDNN."""
    bias: Float[Tensor, "hidden"]
    """Of the convolution."""
    fc2: Linear
    """Over rows."""

    @classmethod
    def of(cls, step: ConvMlpStep, int8: bool) -> "ConvMlp":
        hidden = len(step.conv_bias)
        filters = packed(step.conv.t().reshape(hidden, 1, 3, 3), (1, hidden, *step.grid), 1, (1, 1), hidden)
        bias = step.conv_bias.to(step.conv.dtype)
        return cls(step, linear(step.fc1, int8), filters, bias, linear(step.fc2, int8))

    @property
    def how(self) -> str:
        return f"{self.fc1.how} + oneDNN + {self.fc2.how}"

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        step, grid = self.step, self.step.grid
        h = self.fc1(normalised(x, step.norm)).unflatten(0, (len(x), -1))
        h = convolve_tokens(h, grid, self.filters, self.bias, grid, 1, (1, 1), len(self.bias))
        return self.fc2(_activated(h, "gelu").flatten(0, 1), x.reshape(-1, x.shape[-1])).view(x.shape)


def conv_mlp(step: ConvMlpStep, int8: bool) -> BlockedConvMlp | ConvMlp | None:
    """The form that suits the step's width; None where oneDNN has no such convolutions or the step is not fused."""
    if not (step.fused and step.fc1.fusable and not step.relu):
        return None
    mixture = step.fc1.router is not None or step.fc2.router is not None
    if onednn().blocked and not onednn().linears and crossing(step.fc1) < (BLOCKED_MIXTURE if mixture else BLOCKED):
        return BlockedConvMlp.of(step)
    return ConvMlp.of(step, int8) if onednn().convolutions else None


def _filters(weight: Float[Tensor, "out flat"], side: int) -> Tensor:
    """Opaque filters of `side` × `side`."""
    return weight.contiguous().reshape(len(weight), -1, side, side).to_mkldnn()


def _opaque(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to_mkldnn()


@dataclass(frozen=True)
class PlainMlp:
    """x + fc2([norm](act(fc1(norm(x)))))."""

    step: MlpStep
    """Its parameters."""
    fc1: Linear
    """Over rows."""
    fc2: Linear
    """Over rows."""

    @classmethod
    def of(cls, step: MlpStep, int8: bool) -> "PlainMlp | None":
        return cls(step, linear(step.fc1, int8), linear(step.fc2, int8)) if step.fc1.fusable and step.fc2.fusable else None

    @property
    def how(self) -> str:
        return f"{self.fc1.how} + {self.fc2.how}"

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        h = _activated(self.fc1(normalised(x, self.step.norm)), self.step.activation)
        return self.fc2(normalised(h, self.step.inner), x.reshape(-1, x.shape[-1])).view(x.shape)


@dataclass(frozen=True)
class RoutedMlp:
    """x + Mlp_e(norm(x)): rows sorted by expert once for both linears."""

    step: RoutedMlpStep
    """Its parameters."""
    experts: tuple[tuple[Dense, Dense], ...]
    """fc1 and fc2 of each."""
    router: Float[Tensor, "in 2"]
    """As `routes` makes it."""

    @property
    def how(self) -> str:
        return f"{self.experts[0][0].how}, rows by expert"

    @classmethod
    def of(cls, step: RoutedMlpStep, int8: bool) -> "RoutedMlp | None":
        if not step.fused:
            return None
        columns = [[Dense.of(w, b) for w, b in zip(part.weight, biases(part), strict=True)] for part in (step.first[0], step.second[0])]
        return cls(step, tuple(zip(*columns, strict=True)), routes(step.router, step.first[0].weight.dtype).t())

    def run(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        a = normalised(x, self.step.norm)
        order, first = sorted_by_expert(second(a @ self.router))
        y = x.reshape(a.shape).clone()
        for (fc1, fc2), index in zip(self.experts, (order[:first], order[first:]), strict=True):
            if len(index):
                y.index_add_(0, index, fc2(_activated(fc1(a.index_select(0, index)), self.step.activation)))
        return y.view(x.shape)


def _activated(h: Tensor, activation: Activation) -> Tensor:
    return torch.ops.aten.gelu_(h) if activation == "gelu" else activate(h, activation)
