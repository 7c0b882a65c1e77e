"""The integer network in torch: the same integers as `reference`, hundreds of times as fast, for accuracy on whole data sets.

It multiplies where the reference shifts: a code's integer is ±2^(e − 1), and a product of integers below 2^53 is exact in float64.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from .layers import heads_of, merged
from .network import Network
from .reference import NORM_FRACTION


def run(network: Network, image: Int[Tensor, "B N C"]) -> dict[str, Tensor]:
    """Every tensor, int64, for an integer image."""
    tensors = {"image": image.long()}
    for layer in network.description["layers"]:
        arrays = {field: torch.from_numpy(network.arrays[name].astype(np.int64)) for field, name in layer["arrays"].items()}
        tensors[layer["name"]] = _KINDS[layer["kind"]](layer | arrays, *(tensors[name] for name in layer["inputs"]))
    return tensors


def logits(network: Network, image: Int[Tensor, "B N C"]) -> Int[Tensor, "B K"]:
    """The output's integers."""
    return run(network, image)[network.description["output"]][:, 0]


def code_integers(codes: Int[Tensor, "out in"], bits: int) -> Int[Tensor, "out in"]:
    """0 or ±2^(e − 1)."""
    e = codes & (2 ** (bits - 1) - 1)
    magnitude = torch.where(e == 0, 0, 2 ** (e - 1).clamp_min(0))
    return torch.where(codes >= 2 ** (bits - 1), -magnitude, magnitude)


def rescale(accumulator: Int[Tensor, "*shape"], shift: Tensor | int, bits: int) -> Int[Tensor, "*shape"]:
    """⌊acc·2^−shift + ½⌋, saturated."""
    shift = torch.as_tensor(shift)
    right, left = shift.clamp_min(0), (-shift).clamp_min(0)
    half = torch.where(right > 0, 2 ** (right - 1).clamp_min(0), 0)
    return _saturate(torch.bitwise_right_shift(torch.bitwise_left_shift(accumulator, left) + half, right), bits)


def _saturate(x: Tensor, bits: int) -> Tensor:
    return x.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _exact(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double()).long()


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(2 * a + b, 2 * b, rounding_mode="floor")


def _sqrt(x: Tensor) -> Tensor:
    """⌊√x⌋: float64's root is off by one at most."""
    root = x.double().sqrt().long()
    root = torch.where(root * root > x, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= x, root + 1, root)


def _linear(p: Mapping[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return rescale(_exact(x, weight.t()) + p["bias"], p["shift"], p["bits"])


def _conv(p, x):
    grid = x.transpose(1, 2).reshape(len(x), -1, *p["grid"]).double()
    groups = grid.shape[1] if p["depthwise"] else 1
    y = F.conv2d(grid, p["weight"].double(), stride=p["stride"], padding=p["padding"], groups=groups)
    return rescale(y.long().flatten(2).transpose(1, 2) + p["bias"], p["shift"], p["bits"])


def _token_conv(p, x):
    v, weight = heads_of(x, p["heads"]).double(), p["weight"].double().reshape(1, p["heads"], -1, 1)
    window, prefix = weight.shape[2], p["prefix"]
    body = F.conv2d(v[:, :, prefix:], weight.transpose(0, 1), padding=(window // 2, 0), groups=p["heads"])
    y = torch.cat([v[:, :, :prefix] * weight[:, :, window // 2 : window // 2 + 1], body], dim=2)
    return rescale(merged(y).long(), p["shift"], p["bits"])


def _shift_add(p, *inputs):
    total = sum(sign * 2**place * x for x, terms in zip(inputs, p["terms"], strict=True) for sign, place in terms)
    return rescale(total + p.get("constant", 0), p["shift"], p["bits"])


def _codes(p, x):
    by_head = heads_of(x, p["heads"])
    above = by_head * by_head.shape[-1] > by_head.sum(-1, keepdim=True) if p["rule"] == "token" else by_head > 0
    return merged(above.long())


def _signs(x: Tensor, p: Mapping[str, Any]) -> Tensor:
    return 2 * x - 1 if p["plus_minus"] else x


def _keys(p, k, v):
    return _exact(_signs(heads_of(k, p["heads"]), p).transpose(-2, -1), heads_of(v, p["heads"]))


def _queries(p, q, context):
    return merged(_exact(_signs(heads_of(q, p["heads"]), p), context))


def _layer_norm(p, x):
    channels = x.shape[-1]
    d = channels * x - x.sum(-1, keepdim=True)
    root = _sqrt(torch.div(d.square().sum(-1, keepdim=True), channels, rounding_mode="floor") + p["eps"])
    return rescale(_divide(d * 2**NORM_FRACTION, root) * p["gamma"] + p["beta"], p["shift"], p["bits"])


def _unit(p, x):
    by_head = heads_of(x, p["heads"])
    root = _sqrt(by_head.square().sum(-1, keepdim=True)).clamp_min(1)
    return merged(_saturate(_divide(by_head * 2 ** p["fraction"], root), p["bits"]))


def _softmax(p, q, k, v):
    q, k, v = (heads_of(x, p["heads"]) for x in (q, k, v))
    scores = _exact(q, k.transpose(-2, -1))
    below = rescale(scores.amax(-1, keepdim=True) - scores, p["index_shift"], 62).clamp_max(len(p["table"]) - 1)
    e, gain = p["table"][below], p["gain"]
    y = _divide(_exact(e, v) * 2 ** max(gain, 0), e.sum(-1, keepdim=True) * 2 ** max(-gain, 0))
    return merged(_saturate(y, p["bits"]))


def _mean(p, x):
    return _divide(x[:, p["first"] :].sum(1, keepdim=True), torch.tensor(x.shape[1] - p["first"]))


def _select(p, index, *experts):
    return torch.stack(experts, dim=-1).gather(-1, index[:, :, None, None].expand(*experts[0].shape, 1)).squeeze(-1)


_KINDS = {
    "shift_linear": lambda p, x: _linear(p, x, code_integers(p["codes"], p["code_bits"])),
    "linear": lambda p, x: _linear(p, x, p["weight"]),
    "conv": _conv,
    "token_conv": _token_conv,
    "shift_add": _shift_add,
    "codes": _codes,
    "mat_add_keys": _keys,
    "mat_add_queries": _queries,
    "layer_norm": _layer_norm,
    "unit": _unit,
    "softmax_attention": _softmax,
    "mean_tokens": _mean,
    "route": lambda p, x: _exact(x, p["weight"].t()).argmax(-1),
    "table": lambda p, x: p["table"][x - p["lowest"]],
    "select": _select,
    "cut": lambda p, x: x[:, slice(*p["tokens"]), slice(*p["channels"])],
    "prepend": lambda p, x: torch.cat([p["rows"].expand(len(x), -1, -1), x], dim=1),
}
