"""The layers of an integer network before they are integers: their float parameters, and what each computes on floats.

The float meaning is what calibration watches, and a check: the lowered network gives the model's logits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.layers.attention import unit
from shiftaddvit.ops.matshift import formats

Primitive = Literal["mult", "shift", "add", "none"]


@dataclass(frozen=True)
class Layer:
    """One step of the network; its output is the tensor of the same name."""

    kind: str
    """A function of `reference.KINDS`."""
    name: str
    """Of the module it comes from, as far as there is one."""
    inputs: tuple[str, ...]
    """Names of the layers whose outputs it reads; `image` is the network's input."""
    primitive: Primitive
    """What its arithmetic is made of; `none` moves data or looks it up."""
    bits: int | None = None
    """Width of its output; None where it follows from the inputs."""
    like: str | None = None
    """The layer whose values decide the output's fraction, where experts must agree; itself if None."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Float tensors and plain values, by the names of the kind."""


def meaning(layer: Layer, inputs: list[Tensor]) -> Float[Tensor, "B N C"]:
    """What the layer computes on real numbers, in float64."""
    return _MEANINGS[layer.kind](layer.params, *inputs)


def float_run(layers: list[Layer], image: Float[Tensor, "B N C"]) -> dict[str, Tensor]:
    """Every tensor by name."""
    tensors = {"image": image.double()}
    for layer in layers:
        tensors[layer.name] = meaning(layer, [tensors[name] for name in layer.inputs])
    return tensors


def decoded(p: Mapping[str, Any]) -> Float[Tensor, "out in"]:
    """The weight that codes stand for."""
    return formats.decode(p["codes"], p["code_bits"], p["offset"]).double()


def heads_of(x: Tensor, heads: int) -> Float[Tensor, "B h N d"]:
    """(B, N, h·d) → (B, h, N, d)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x: Float[Tensor, "B h N d"]) -> Float[Tensor, "B N C"]:
    """The inverse of `heads_of`."""
    return x.transpose(1, 2).flatten(2)


def _conv(p, x):
    grid = x.transpose(1, 2).reshape(len(x), -1, *p["grid"])
    y = F.conv2d(grid, p["weight"], p["bias"], stride=p["stride"], padding=p["padding"], groups=grid.shape[1] if p["depthwise"] else 1)
    return y.flatten(2).transpose(1, 2)


def _token_conv(p, x):
    v, weight = heads_of(x, p["heads"]), p["weight"].reshape(p["heads"], 1, -1, 1)
    window, prefix = weight.shape[2], p["prefix"]
    body = F.conv2d(v[:, :, prefix:], weight, padding=(window // 2, 0), groups=p["heads"])
    return merged(torch.cat([v[:, :, :prefix] * weight[None, :, 0, window // 2 : window // 2 + 1], body], dim=2))


def _codes(p, x):
    x = heads_of(x, p["heads"])
    threshold = x.mean(-1, keepdim=True) if p["rule"] == "token" else 0.0
    return merged((x > threshold).double())


def _signs(x: Tensor, p) -> Tensor:
    return 2 * x - 1 if p["plus_minus"] else x


def _select(p, index, *experts):
    chosen = experts[0]
    for number, expert in enumerate(experts[1:], start=1):
        chosen = torch.where((index == number).unsqueeze(-1), expert, chosen)
    return chosen


def _shift_add(p, *inputs):
    total = sum(c * x for c, x in zip(p["coefficients"], inputs, strict=True))
    return total if p.get("constant") is None else total + p["constant"]


def _softmax(p, q, k, v):
    return merged(F.scaled_dot_product_attention(*(heads_of(x, p["heads"]) for x in (q, k, v))))


def _cut(p, x):
    (first, last), (start, stop) = p["tokens"], p["channels"]
    return x[:, first:last, start:stop]


_MEANINGS = {
    "linear": lambda p, x: F.linear(x, p["weight"], p["bias"]),
    "shift_linear": lambda p, x: F.linear(x, decoded(p), p["bias"]),
    "conv": _conv,
    "token_conv": _token_conv,
    "layer_norm": lambda p, x: F.layer_norm(x, p["weight"].shape, p["weight"], p["bias"], p["eps"]),
    "table": lambda p, x: p["function"](x),
    "shift_add": _shift_add,
    "codes": _codes,
    "mat_add_keys": lambda p, k, v: _signs(heads_of(k, p["heads"]), p).transpose(-2, -1) @ heads_of(v, p["heads"]),
    "mat_add_queries": lambda p, q, context: merged(_signs(heads_of(q, p["heads"]), p) @ context),
    "unit": lambda p, x: merged(unit(heads_of(x, p["heads"]))).double(),
    "softmax_attention": _softmax,
    "mean_tokens": lambda p, x: x[:, p["first"] :].mean(1, keepdim=True),
    "route": lambda p, x: F.linear(x, p["weight"]).argmax(-1),
    "select": _select,
    "cut": _cut,
    "prepend": lambda p, x: torch.cat([p["rows"].expand(len(x), -1, -1), x], dim=1),
}


def signed_digits(constant: float, precision: float = 2.0**-12) -> list[tuple[int, int]]:
    """`constant` as Σ sign·2^place, greedily, to a relative precision: (sign, place) pairs. A power of two is one term."""
    terms, rest = [], constant
    while abs(rest) > abs(constant) * precision:
        place = math.floor(math.log2(abs(rest)) + 1 - math.log2(1.5))
        terms.append((1 if rest > 0 else -1, place))
        rest -= terms[-1][0] * 2.0**place
    return terms
