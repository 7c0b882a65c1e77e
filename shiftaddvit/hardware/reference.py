"""The integer network, executed literally: NumPy and nothing else, so that this file can travel with the vectors.

    python reference.py FOLDER            runs the exported images and compares every tensor of every layer, bit for bit

Every tensor is an array of signed integers, (images, tokens, channels) unless said otherwise; a tensor with fraction f stands for its
integers times 2^−f. Every function below is one kind of layer; `p` holds the fields of its descriptor and its arrays. int64 is wide
enough for all of them: `accumulator_bits` of a descriptor says what the hardware needs.

Layers with primitive `shift` or `add` use additions, subtractions, comparisons, selections and shifts only.
"""

import json
import sys
from pathlib import Path

import numpy as np

NORM_FRACTION = 10
"""Fraction bits of a normalised value inside `layer_norm`."""


def round_shift(x, shift):
    """x·2^−shift rounded to the nearest integer, halves towards +∞: add half, shift right. A negative shift goes left and is exact.
    `shift` is one integer or one a channel."""
    shift = np.asarray(shift, dtype=np.int64)
    right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    return ((x << left) + half) >> right


def saturate(x, bits):
    """The nearest integer that `bits` signed bits hold."""
    return np.minimum(np.maximum(x, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)


def round_divide(a, b):
    """a/b rounded to the nearest integer, halves towards +∞; b > 0."""
    return np.floor_divide((a << 1) + b, b << 1)


def integer_sqrt(x):
    """⌊√x⌋ for 0 ≤ x < 2^62, digit by digit: comparisons, subtractions and shifts."""
    root, rest = np.zeros_like(x), x
    for place in range(60, -1, -2):
        trial = root + (1 << place)
        fits = rest >= trial
        rest = np.where(fits, rest - trial, rest)
        root = np.where(fits, (root >> 1) + (1 << place), root >> 1)
    return root


def times_constant(x, constant):
    """x·constant for a constant from 1: one shifted addition for every 1 in its binary form."""
    places = [place for place in range(int(constant).bit_length()) if constant >> place & 1]
    total = x << places[0]
    for place in places[1:]:
        total = total + (x << place)
    return total


def finish(accumulator, p):
    """What ends every layer with an accumulator: rescale by a shift, saturate."""
    return saturate(round_shift(accumulator, p["shift"]), p["bits"])


# --- primitive shift -------------------------------------------------------------------------------------------------


def shift_linear(p, x):
    """acc[o] = bias[o] + Σ_k ±(x[k] << (e[o, k] − 1)); code = sign << (code_bits − 1) | e, and e = 0 adds nothing."""
    place = p["code_bits"] - 1
    e = p["codes"].astype(np.int64) & ((1 << place) - 1)
    negative = (p["codes"].astype(np.int64) >> place) == 1
    accumulator = np.zeros((*x.shape[:-1], e.shape[0]), np.int64) + p["bias"]
    for k in range(x.shape[-1]):
        term = x[..., k : k + 1] << np.maximum(e[:, k] - 1, 0)
        accumulator = accumulator + np.where(e[:, k] == 0, 0, np.where(negative[:, k], -term, term))
    return finish(accumulator, p)


# --- primitive add ---------------------------------------------------------------------------------------------------


def shift_add(p, *inputs):
    """Σ over inputs and their terms of ±(x << place), plus a constant: residuals, and factors such as 1/(πN) in signed binary digits."""
    total = p.get("constant", np.int64(0))
    for x, terms in zip(inputs, p["terms"], strict=True):
        for sign, place in terms:
            total = total + (x << place) if sign > 0 else total - (x << place)
    return finish(total, p)


def codes(p, x):
    """1 where x exceeds its head's mean (width·x > Σ x), or zero for the rule `zero`; else 0. What 0 stands for is said where codes are used."""
    by_head = _heads(x, p["heads"])
    threshold = by_head.sum(axis=-1, keepdims=True) if p["rule"] == "token" else np.int64(0)
    scaled = times_constant(by_head, by_head.shape[-1]) if p["rule"] == "token" else by_head
    return (scaled > threshold).reshape(x.shape).astype(np.int64)


def mat_add_keys(p, keys, values):
    """context[h, r, d] = Σ_j codes[j, r] ? v[j, d] : 0 (or −v[j, d] for ±1 codes); (images, heads, codes, width)."""
    k, v = _heads(keys, p["heads"]), _heads(values, p["heads"])
    total = np.int64(0)
    for j in range(k.shape[1]):
        row = v[:, j, :, None, :]
        total = total + np.where(k[:, j, :, :, None] == 1, row, -row if p["plus_minus"] else 0)
    return total


def mat_add_queries(p, queries, context):
    """o[i, d] = Σ_r codes[i, r] ? context[r, d] : 0 (or its negative)."""
    q = _heads(queries, p["heads"])
    total = np.int64(0)
    for r in range(q.shape[-1]):
        row = context[:, None, :, r, :]
        total = total + np.where(q[..., r, None] == 1, row, -row if p["plus_minus"] else 0)
    return total.reshape(*queries.shape[:2], -1)


# --- primitive mult: what still multiplies or divides ----------------------------------------------------------------


def linear(p, x):
    """acc[o] = bias[o] + Σ_k x[k]·weight[o, k] with weights of 8 bits."""
    return finish(x @ p["weight"].T.astype(np.int64) + p["bias"], p)


def conv(p, x):
    """A convolution over the tokens in their grid, row by row; weights of 8 bits, zero padding. Full or depthwise."""
    height, width = p["grid"]
    grid = x.reshape(len(x), height, width, -1)
    (up, left), (down, right), weight = p["padding"], p["stride"], p["weight"].astype(np.int64)
    grid = np.pad(grid, ((0, 0), (up, up), (left, left), (0, 0)))
    rows, columns = (grid.shape[1] - weight.shape[2]) // down + 1, (grid.shape[2] - weight.shape[3]) // right + 1
    accumulator = p["bias"]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            taps = grid[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
            accumulator = accumulator + (taps * weight[:, 0, i, j] if p["depthwise"] else taps @ weight[:, :, i, j].T)
    return finish(accumulator, p).reshape(len(x), rows * columns, -1)


def token_conv(p, x):
    """A window over neighbouring tokens, one filter a head; the first `prefix` tokens see only themselves."""
    v, weight = _heads(x, p["heads"]), p["weight"].astype(np.int64)[:, :, None]  # (heads, window, 1)
    window, prefix = weight.shape[1], p["prefix"]
    body = np.pad(v[:, prefix:], ((0, 0), (window // 2, window // 2), (0, 0), (0, 0)))
    tokens = v.shape[1] - prefix
    accumulator = np.int64(0)
    for tap in range(window):
        accumulator = accumulator + body[:, tap : tap + tokens] * weight[:, tap]
    accumulator = np.concatenate([v[:, :prefix] * weight[:, window // 2], accumulator], axis=1)
    return finish(accumulator.reshape(x.shape), p)


def layer_norm(p, x):
    """d = C·x − Σx; r = ⌊√(⌊Σd²/C⌋ + eps)⌋; n = d·2^10 / r, rounded; acc = n·gamma + beta."""
    channels = x.shape[-1]
    d = x * channels - x.sum(axis=-1, keepdims=True)
    r = integer_sqrt(np.floor_divide((d * d).sum(axis=-1, keepdims=True), channels) + p["eps"])
    return finish(round_divide(d << NORM_FRACTION, r) * p["gamma"] + p["beta"], p)


def unit(p, x):
    """Each head's vector over its length r = max(1, ⌊√Σx²⌋): x·2^fraction / r, rounded."""
    by_head = _heads(x, p["heads"])
    r = np.maximum(integer_sqrt((by_head * by_head).sum(axis=-1, keepdims=True)), 1)
    return saturate(round_divide(by_head << p["fraction"], r), p["bits"]).reshape(x.shape)


def softmax_attention(p, q, k, v):
    """s = q·k; e = table[min((max s − s)·2^−index_shift, last)]; (Σ_j e_j v_j)·2^gain / Σ_j e_j, rounded."""
    q, k, v = (_heads(x, p["heads"]).transpose(0, 2, 1, 3) for x in (q, k, v))  # (images, heads, tokens, width)
    scores = q @ k.transpose(0, 1, 3, 2)
    below = scores.max(axis=-1, keepdims=True) - scores
    e = np.take(p["table"].astype(np.int64), np.minimum(round_shift(below, p["index_shift"]), len(p["table"]) - 1))
    gain = p["gain"]
    y = round_divide((e @ v) << max(gain, 0), e.sum(axis=-1, keepdims=True) << max(-gain, 0))
    return saturate(y, p["bits"]).transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def mean_tokens(p, x):
    """The mean over the tokens from `first` on, rounded; (images, 1, channels)."""
    return round_divide(x[:, p["first"] :].sum(axis=1, keepdims=True), np.int64(x.shape[1] - p["first"]))


def route(p, x):
    """The expert of every token: the first largest of x·weight; (images, tokens)."""
    return (x @ p["weight"].T.astype(np.int64)).argmax(axis=-1)


# --- no arithmetic ---------------------------------------------------------------------------------------------------


def table(p, x):
    """y = table[x − lowest x]: GELU."""
    return np.take(p["table"].astype(np.int64), x - p["lowest"])


def select(p, index, *experts):
    """Each token's row from the expert that `route` chose. Hardware computes that one only."""
    chosen = experts[0]
    for number, expert in enumerate(experts[1:], start=1):
        chosen = np.where((index == number)[..., None], expert, chosen)
    return chosen


def cut(p, x):
    """Tokens and channels [start, stop) of the input."""
    (first, last), (start, stop) = p["tokens"], p["channels"]
    return x[:, first:last, start:stop]


def prepend(p, x):
    """Constant tokens (class, distillation, registers) in front."""
    rows = p["rows"].astype(np.int64)
    return np.concatenate([np.broadcast_to(rows, (len(x), *rows.shape)), x], axis=1)


KINDS = {
    "shift_linear": shift_linear, "shift_add": shift_add, "codes": codes, "mat_add_keys": mat_add_keys, "mat_add_queries": mat_add_queries,
    "linear": linear, "conv": conv, "token_conv": token_conv, "layer_norm": layer_norm, "unit": unit, "softmax_attention": softmax_attention,
    "mean_tokens": mean_tokens, "route": route, "table": table, "select": select, "cut": cut, "prepend": prepend,
}  # fmt: skip


def run_layer(layer, arrays, inputs):
    """The output of one descriptor, `arrays` holding all arrays by the names that descriptors give."""
    p = layer | {field: arrays[name] for field, name in layer["arrays"].items()}
    return KINDS[layer["kind"]](p, *inputs)


def run(network, arrays, image):
    """Every tensor by name; `image` is (images, height·width, channels) at the fraction of the tensor `image`."""
    tensors = {"image": np.asarray(image, np.int64)}
    for layer in network["layers"]:
        tensors[layer["name"]] = run_layer(layer, arrays, [tensors[name] for name in layer["inputs"]])
    return tensors


def read(folder):
    """The network and its arrays from an exported folder."""
    network = json.loads((Path(folder) / "network.json").read_text())
    names = {name for layer in network["layers"] for name in layer["arrays"].values()}
    return network, {name: np.load(Path(folder) / "arrays" / f"{name}.npy") for name in sorted(names)}


def main(folder):
    """Run the exported images; 0 if every tensor is what the folder says."""
    network, arrays = read(folder)
    tensors = run(network, arrays, np.load(Path(folder) / "vectors" / "image.npy"))
    wrong = [name for name, tensor in tensors.items() if not np.array_equal(tensor, np.load(Path(folder) / "vectors" / f"{name}.npy"))]
    print(f"{len(tensors)} tensors, {len(wrong)} differ{': ' + ', '.join(wrong[:8]) if wrong else ''}")
    return 1 if wrong else 0


def _heads(x, heads):
    """(images, tokens, channels) → (images, tokens, heads, width)."""
    return x.reshape(*x.shape[:2], heads, -1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
