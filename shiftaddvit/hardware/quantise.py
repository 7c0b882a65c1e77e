"""From layers with float parameters and calibrated ranges to integers: fractions, codes, rescaling shifts, and the width of every accumulator."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftaddvit.errors import UserError

from .calibrate import Observed
from .layers import Layer, signed_digits
from .network import VERSION, Network
from .reference import NORM_FRACTION
from .widths import Widths

_WEIGHT_LIMIT = 127
"""Largest weight of a layer that multiplies: 8 bits, symmetric."""
_ROOM = 62
"""Bits that the reference's int64 may use."""

Arrays = dict[str, np.ndarray]


def quantise(layers: list[Layer], floats: Mapping[str, Observed], widths: Widths, grid: tuple[int, int]) -> Network:
    """The integer network; `floats` are the values that its tensors took on calibration images.

    UserError for ranges that do not fit (an accumulator of more than 62 bits), named.
    """
    broken = [name for name, seen in floats.items() if not torch.isfinite(seen.values).all()]
    if broken:
        raise UserError(f"calibration gives values of {broken[0]} that are not finite")
    tensors = {"image": _format(widths.image, fraction_for(floats["image"].values, widths.image), floats["image"])}
    descriptors, arrays = [], {}
    for layer in layers:
        fields, own, bits, fraction = _KINDS[layer.kind](layer, [tensors[name] for name in layer.inputs], floats)
        names = {field: f"{layer.name}.{field}" for field in own}
        descriptors.append(
            {"name": layer.name, "kind": layer.kind, "primitive": layer.primitive, "inputs": list(layer.inputs), "arrays": names, **fields}
        )
        arrays |= {names[field]: narrowest(own[field]) for field in own}
        tensors[layer.name] = _format(bits, fraction, floats[layer.name])
        if fields.get("accumulator_bits", 0) > _ROOM:
            raise UserError(f"{layer.name} needs an accumulator of {fields['accumulator_bits']} bits; {_ROOM} are there")
    description = {
        "format": VERSION, "input": "image", "output": layers[-1].name, "image_size": list(grid), "tensors": tensors, "layers": descriptors,
    }  # fmt: skip
    return Network(description, arrays)


def fraction_for(values: Tensor, bits: int) -> int:
    """The fraction f for which saturated integers of `bits` bits times 2^−f are nearest to `values` (least squares): that which holds
    the largest one, or up to three more."""
    largest = float(values.abs().max())
    if largest == 0:
        return 0
    base = bits - 1 - math.ceil(math.log2(largest) + 1e-9)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(fraction: int) -> float:
        scaled = torch.round(values * 2.0**fraction).clamp(low, high) * 2.0**-fraction
        return float((scaled - values).square().mean())

    return min(range(base, base + 4), key=error)


def narrowest(array: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type of 8, 16, 32 or 64 bits."""
    array = np.asarray(array, np.int64)
    for kind in (np.int8, np.int16, np.int32):
        if array.size == 0 or (np.iinfo(kind).min <= array.min() and array.max() <= np.iinfo(kind).max):
            return array.astype(kind)
    return array


def signed_width(bound: int) -> int:
    """Bits of the signed integers from −bound to bound."""
    return int(bound).bit_length() + 1


def _format(bits: int, fraction: int, seen: Observed) -> dict[str, Any]:
    return {"bits": bits, "fraction": fraction, "shape": list(seen.shape)}


def _chosen(layer: Layer, floats: Mapping[str, Observed]) -> int:
    return fraction_for(floats[layer.like or layer.name].values, layer.bits)


def _largest(tensor: Mapping[str, Any]) -> int:
    """Largest magnitude of its integers."""
    return 2 ** (tensor["bits"] - 1)


def _rows(magnitude: np.ndarray, weight_fraction: np.ndarray, bias: Tensor | None, source: Mapping, fraction: int):
    """Shift, bias and accumulator bound of every output channel: `magnitude` (out, …) are |integer weights|, which stand for 2^−weight_fraction
    times themselves. Also the channels whose sums are all below half a unit of the output: their weights count for nothing."""
    bound = magnitude.reshape(len(magnitude), -1).astype(object).sum(axis=1) * _largest(source)
    shift = source["fraction"] + weight_fraction - fraction
    silent = np.array([int(b) < 2 ** max(int(s) - 1, 0) if s > 0 else False for b, s in zip(bound, shift, strict=True)])
    shift = np.where(silent, 0, shift)
    real = np.zeros(len(magnitude)) if bias is None else bias.cpu().numpy()
    whole = np.array([round(float(b) * 2.0 ** (int(s) + fraction)) for b, s in zip(real, shift, strict=True)], dtype=object)
    total = max(
        max((0 if quiet else int(b)) + abs(int(w)) + (2 ** (int(s) - 1) if s > 0 else 0), (abs(int(w)) + int(b)) * 2 ** max(-int(s), 0))
        for b, w, s, quiet in zip(bound, whole, shift, silent, strict=True)
    )
    return shift.astype(np.int64), whole.astype(np.int64), signed_width(total), silent


def _dense_rows(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights of 8 bits and their fraction, one a row."""
    rows = weight.cpu().numpy().reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1)
    fraction = np.array([math.floor(math.log2(_WEIGHT_LIMIT / value)) if value > 0 else 0 for value in largest])
    return np.rint(rows * 2.0 ** fraction[:, None]).astype(np.int64).reshape(weight.shape), fraction


def _multiplying(layer: Layer, source: Mapping, floats: Mapping[str, Observed]):
    fraction = _chosen(layer, floats)
    weight, weight_fraction = _dense_rows(layer.params["weight"])
    shift, bias, width, silent = _rows(np.abs(weight), weight_fraction, layer.params["bias"], source, fraction)
    weight[silent] = 0
    return {"bits": layer.bits, "weight_bits": 8, "accumulator_bits": width}, {"weight": weight, "shift": shift, "bias": bias}, layer.bits, fraction


def _linear(layer, sources, floats):
    return _multiplying(layer, sources[0], floats)


def _conv(layer, sources, floats):
    fields, arrays, bits, fraction = _multiplying(layer, sources[0], floats)
    geometry = {key: layer.params[key] for key in ("grid", "stride", "padding", "depthwise")}
    return fields | {key: list(value) if isinstance(value, tuple) else value for key, value in geometry.items()}, arrays, bits, fraction


def _shift_linear(layer, sources, floats):
    p, fraction = layer.params, _chosen(layer, floats)
    place = p["code_bits"] - 1
    codes = p["codes"].cpu().numpy().astype(np.int64)
    e = codes & (2**place - 1)
    offset = np.zeros(len(codes), np.int64) if p["offset"] is None else p["offset"].cpu().numpy().astype(np.int64).reshape(-1)
    magnitude = np.where(e == 0, 0, np.int64(1) << np.maximum(e - 1, 0))
    # A code's integer is 2^(e − 1), its value 2^(e − e_max + offset).
    shift, bias, width, silent = _rows(magnitude, 2**place - 2 - offset, p["bias"], sources[0], fraction)
    codes[silent] = 0
    fields = {"bits": layer.bits, "code_bits": p["code_bits"], "accumulator_bits": width}
    return fields, {"codes": codes, "shift": shift, "bias": bias}, layer.bits, fraction


def _token_conv(layer, sources, floats):
    p, fraction = layer.params, _chosen(layer, floats)
    weight, weight_fraction = _dense_rows(p["weight"])
    head_shift, _, width, silent = _rows(np.abs(weight), weight_fraction, None, sources[0], fraction)
    weight[silent] = 0
    channels = sources[0]["shape"][-1] // p["heads"]
    fields = {"bits": layer.bits, "weight_bits": 8, "accumulator_bits": width, "heads": p["heads"], "prefix": p["prefix"]}
    return fields, {"weight": weight, "shift": np.repeat(head_shift, channels)}, layer.bits, fraction


def _layer_norm(layer, sources, floats):
    p, fraction, channels = layer.params, _chosen(layer, floats), len(layer.params["weight"])
    gamma_fraction = min(14, math.floor(math.log2((2**15 - 1) / max(float(p["weight"].abs().max()), 1e-9))))
    gamma = np.rint(p["weight"].cpu().numpy() * 2.0**gamma_fraction)
    beta = np.rint(p["bias"].cpu().numpy() * 2.0 ** (NORM_FRACTION + gamma_fraction))
    eps = max(1, round(p["eps"] * channels**2 * 4.0 ** sources[0]["fraction"]))
    shift = NORM_FRACTION + gamma_fraction - fraction
    # |d| < 2·C·2^(b−1), and |n| ≤ √C.
    squares = signed_width(channels**3 * _largest(sources[0]) ** 2 + eps)
    product = signed_width(int(math.sqrt(channels) * 2**NORM_FRACTION * np.abs(gamma).max() + np.abs(beta).max()) * 2 ** max(-shift, 0))
    fields = {"bits": layer.bits, "eps": eps, "shift": shift, "accumulator_bits": max(squares, product)}
    return fields, {"gamma": gamma, "beta": beta}, layer.bits, fraction


def _table(layer, sources, floats):
    fraction, (source,) = _chosen(layer, floats), sources
    lowest = -_largest(source)
    points = torch.arange(lowest, -lowest, dtype=torch.float64) * 2.0 ** -source["fraction"]
    values = torch.round(layer.params["function"](points) * 2.0**fraction).clamp(-(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1)
    return {"bits": layer.bits, "lowest": lowest}, {"table": values.numpy()}, layer.bits, fraction


def _shift_add(layer, sources, floats):
    fraction = _chosen(layer, floats)
    digits = [signed_digits(coefficient) for coefficient in layer.params["coefficients"]]
    # The accumulator's fraction is the finest of all terms, so that every place is a shift to the left.
    finest = max(source["fraction"] - place for source, terms in zip(sources, digits, strict=True) for _, place in terms)
    terms = [[[sign, finest - source["fraction"] + place] for sign, place in digit] for source, digit in zip(sources, digits, strict=True)]
    bound = sum(_largest(source) * 2**place for source, term in zip(sources, terms, strict=True) for _, place in term)
    arrays: Arrays = {}
    if layer.params.get("constant") is not None:
        arrays["constant"] = np.rint(layer.params["constant"].cpu().numpy() * 2.0**finest)
        bound += int(np.abs(arrays["constant"]).max())
    shift = finest - fraction
    width = signed_width(bound * 2 ** max(-shift, 0) + 2 ** max(shift - 1, 0))
    return {"bits": layer.bits, "terms": terms, "shift": shift, "accumulator_bits": width}, arrays, layer.bits, fraction


def _codes(layer, sources, floats):
    p, width = layer.params, sources[0]["shape"][-1] // layer.params["heads"]
    return {"heads": p["heads"], "rule": p["rule"], "accumulator_bits": signed_width(width * _largest(sources[0]))}, {}, 2, 0


def _mat_add(layer, sources, terms: int, values: Mapping):
    width = signed_width(terms * _largest(values))
    return {"heads": layer.params["heads"], "plus_minus": layer.params["plus_minus"], "accumulator_bits": width}, {}, width, values["fraction"]


def _mat_add_keys(layer, sources, floats):
    return _mat_add(layer, sources, sources[0]["shape"][0], sources[1])


def _mat_add_queries(layer, sources, floats):
    return _mat_add(layer, sources, sources[0]["shape"][-1] // layer.params["heads"], sources[1])


def _unit(layer, sources, floats):
    width, fraction = sources[0]["shape"][-1] // layer.params["heads"], layer.bits - 2
    squares = signed_width(width * _largest(sources[0]) ** 2)
    fields = {"bits": layer.bits, "heads": layer.params["heads"], "fraction": fraction}
    return fields | {"accumulator_bits": max(squares, sources[0]["bits"] + fraction + 2)}, {}, layer.bits, fraction


def _softmax(layer, sources, floats):
    q, k, v = sources
    heads, last = layer.params["heads"], 1023
    width = q["shape"][-1] // heads
    step = 2.0 ** -(q["fraction"] + k["fraction"]) / math.sqrt(width)
    # The table reaches e^−12, which is below its own half unit.
    index_shift = max(0, math.ceil(math.log2(12 / (last * step))))
    table = np.rint(np.exp(-np.arange(last + 1) * step * 2.0**index_shift) * (2**15 - 1))
    fraction = _chosen(layer, floats)
    gain = fraction - v["fraction"]
    scores = signed_width(2 * width * _largest(q) * _largest(k))
    sums = signed_width(k["shape"][0] * 2**15 * _largest(v) * 2 ** (abs(gain) + 1))
    fields = {"bits": layer.bits, "heads": heads, "index_shift": index_shift, "gain": gain, "accumulator_bits": max(scores, sums)}
    return fields, {"table": table}, layer.bits, fraction


def _mean(layer, sources, floats):
    (source,) = sources
    count = source["shape"][0] - layer.params["first"]
    return (
        {"first": layer.params["first"], "accumulator_bits": signed_width(2 * count * _largest(source) + count)},
        {},
        source["bits"],
        source["fraction"],
    )


def _route(layer, sources, floats):
    weight = layer.params["weight"].cpu().numpy()
    fraction = math.floor(math.log2(_WEIGHT_LIMIT / max(float(np.abs(weight).max()), 1e-30)))
    whole = np.rint(weight * 2.0**fraction)
    width = signed_width(int(np.abs(whole).sum(axis=1).max()) * _largest(sources[0]))
    return {"weight_bits": 8, "accumulator_bits": width}, {"weight": whole}, layer.bits, 0


def _select(layer, sources, floats):
    return {}, {}, sources[1]["bits"], sources[1]["fraction"]


def _cut(layer, sources, floats):
    fields = {key: list(layer.params[key]) for key in ("tokens", "channels")}
    return fields, {}, sources[0]["bits"], sources[0]["fraction"]


def _prepend(layer, sources, floats):
    (source,) = sources
    limit = _largest(source)
    rows = np.clip(np.rint(layer.params["rows"].cpu().numpy() * 2.0 ** source["fraction"]), -limit, limit - 1)
    return {}, {"rows": rows}, source["bits"], source["fraction"]


_KINDS: dict[str, Callable] = {
    "linear": _linear, "conv": _conv, "shift_linear": _shift_linear, "token_conv": _token_conv, "layer_norm": _layer_norm, "table": _table,
    "shift_add": _shift_add, "codes": _codes, "mat_add_keys": _mat_add_keys, "mat_add_queries": _mat_add_queries, "unit": _unit,
    "softmax_attention": _softmax, "mean_tokens": _mean, "route": _route, "select": _select, "cut": _cut, "prepend": _prepend,
}  # fmt: skip
