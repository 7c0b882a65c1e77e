"""Shift codes as files hold them: Huffman-coded, because large weights are rare and their exponents so are too; lossless."""

import os
import zlib
from math import prod

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.packed import PackedShiftLayer
from shiftaddvit.ops.matshift import formats

HEADERLESS = -15
"""zlib's number for a bare deflate stream with the largest window."""


def deflated(codes: UInt8[Tensor, "*shape"]) -> UInt8[Tensor, "bytes"]:
    """The codes, one a byte in row-major order, as a deflate stream (RFC 1951) of literals."""
    stream = zlib.compressobj(9, zlib.DEFLATED, HEADERLESS, 9, zlib.Z_HUFFMAN_ONLY)
    written = stream.compress(codes.contiguous().numpy().tobytes()) + stream.flush()
    return torch.from_numpy(np.frombuffer(written, dtype=np.uint8).copy())


def inflated(stored: Tensor, shape: tuple[int, ...], bits: int, name: str) -> UInt8[Tensor, "*shape"]:
    """The codes of `deflated`. UserError naming the tensor where it holds anything but so many codes of so many bits; no more than
    those is ever unpacked."""
    count = torch.Size(shape).numel()
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        raise UserError(f"{name} must be a row of bytes, is {tuple(stored.shape)} of {stored.dtype}")
    stream = zlib.decompressobj(HEADERLESS)
    try:
        # One byte more than fits shows a stream that is too long.
        found = stream.decompress(stored.numpy().tobytes(), count + 1)
    except zlib.error as error:
        raise UserError(f"{name} is damaged: {error}") from None
    codes = np.frombuffer(found, dtype=np.uint8)
    if len(codes) != count or not stream.eof or stream.unused_data or (count and codes.max() >> bits):
        raise UserError(f"{name} is damaged: it must hold {count} codes of {bits} bits")
    return torch.from_numpy(codes.copy()).view(shape)


def deflate_codes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the codes of every packed layer into a file's tensors, in place of those that lie in memory."""
    tensors |= {key: deflated(layer.integer_codes().cpu()) for key, layer in _codes(model)}


def inflate_codes(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """The reverse, of what is there. UserError naming the file and a tensor that is damaged."""
    for key, layer in _codes(model):
        if key in tensors:
            codes = inflated(tensors[key], (layer.shape[0], prod(layer.shape[1:])), layer.bits, f"{path}: {key}")
            tensors[key] = formats.pack(codes, layer.bits)


def _codes(model: nn.Module) -> list[tuple[str, PackedShiftLayer]]:
    return [(f"{name}.codes".lstrip("."), module) for name, module in model.named_modules() if isinstance(module, PackedShiftLayer)]
