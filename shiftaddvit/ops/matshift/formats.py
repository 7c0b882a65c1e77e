"""How a power-of-two weight is stored: integer codes, codes packed into bytes, and their exact decodings.

A code is `sign << (bits − 1) | e`. e = 0 is zero; otherwise the weight is ±2^(e − e_max + offset[o]) with e_max = 2^(bits−1) − 1:

| bits | e | exponent before the offset |
|---|---|---|
| 4 | 1 … 7 | −6 … 0 |
| 5 | 1 … 15 | −14 … 0 |

`offset` is one integer per output channel, (out, 1), or None for zeros. Zero has one code, 0: the encoder never writes a negative zero.

Packed, a row is padded with zero codes to a whole number of groups of 8. First come the low four bits of every code, two a byte with
the even one in the low half: 4 bytes a group. At 5 bits the row's signs follow, eight a byte with code i in bit i mod 8: 1 byte a group.
A kernel so reads each part of a row in whole words.

Everything here is integer arithmetic on the bits of floats, hence exact on every device.
"""

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from shiftaddvit.errors import UserError

GROUP = 8
"""Codes in the smallest unit of packed storage."""

_FLOATS = {torch.float32: (-126, 127), torch.bfloat16: (-126, 127), torch.float16: (-24, 15)}


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row: `bits` for each started group of 8 codes."""
    _check_bits(bits)
    return -(-in_features // GROUP) * bits


def encode(weight: Float[Tensor, "out in"], bits: int, offset: Int[Tensor, "out 1"] | None = None) -> UInt8[Tensor, "out in"]:
    """The code of every weight. `UserError` names the first value that is neither zero nor a signed power of two in range."""
    _check_bits(bits)
    value = weight.detach().to(torch.float32).contiguous()
    pattern = value.view(torch.int32)
    highest = 2 ** (bits - 1) - 1
    e = ((pattern >> 23) & 0xFF) - 127 + highest
    if offset is not None:
        e = e - _column(offset, weight.shape[0])
    zero = (pattern & 0x7FFFFFFF) == 0
    wrong = ~zero & (((pattern & 0x7FFFFF) != 0) | (e < 1) | (e > highest) | ((pattern & 0x7F800000) == 0))
    if wrong.any():
        raise UserError(_explain(value, wrong, bits, offset))
    sign = (pattern < 0).to(torch.int32) << (bits - 1)
    return torch.where(zero, 0, sign | e).to(torch.uint8)


def decode(
    codes: UInt8[Tensor, "out in"],
    bits: int,
    offset: Int[Tensor, "out 1"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """The exact weights as float32, bfloat16 or float16. `UserError` if an exponent with its offset does not fit the dtype."""
    _check_bits(bits)
    if dtype not in _FLOATS:
        raise UserError(f"dtype must be one of {[str(d) for d in _FLOATS]}, got {dtype}")
    highest = 2 ** (bits - 1) - 1
    magnitude = codes.to(torch.int32) & highest
    exponent = magnitude - highest
    if offset is not None:
        exponent = exponent + _column(offset, codes.shape[0])
        _check_exponents(exponent, magnitude, dtype)
    sign = (codes.to(torch.int32) >> (bits - 1)) << 31
    pattern = torch.where(magnitude == 0, 0, sign | ((exponent + 127) << 23))
    return pattern.view(torch.float32).to(dtype)


def decode_int8(
    codes: UInt8[Tensor, "out in"], offset: Int[Tensor, "out 1"] | None = None
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out"]]:
    """4-bit codes as (values, scale): weight = values · scale[:, None], values in 0, ±1 … ±64, scale = 2^(offset − 6).

    5-bit codes span 2^14 and do not fit eight bits.
    """
    magnitude = codes.to(torch.int32) & 7
    value = torch.where(magnitude == 0, 0, 1 << (magnitude - 1).clamp_min(0))
    value = torch.where(codes >= 8, -value, value).to(torch.int8)
    exponent = torch.full((codes.shape[0],), -6, dtype=torch.int32, device=codes.device)
    if offset is not None:
        exponent = exponent + _column(offset, codes.shape[0]).reshape(-1)
    return value, ((exponent + 127) << 23).view(torch.float32)


def decode_e5m2(codes: UInt8[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """5-bit codes as float8_e5m2 before the channel offset: the byte is `sign << 7 | e << 2`, no arithmetic at all."""
    byte = (codes & 16) << 3 | (codes & 15) << 2
    return byte.view(torch.float8_e5m2)


def channel_scale(offset: Int[Tensor, "out 1"] | None, out_features: int) -> Float[Tensor, "out"]:
    """2^offset of every output channel."""
    if offset is None:
        return torch.ones(out_features)
    return ((_column(offset, out_features).reshape(-1) + 127) << 23).view(torch.float32)


def pack(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out bytes"]:
    """Codes of any row length as bytes, `packed_bytes(in, bits)` a row."""
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise UserError(f"codes must be a uint8 matrix (out, in), got {codes.dtype} {tuple(codes.shape)}")
    groups = -(-codes.shape[1] // GROUP)
    padded = torch.nn.functional.pad(codes, (0, groups * GROUP - codes.shape[1]))
    low = padded & 15
    halves = low[:, 0::2] | low[:, 1::2] << 4
    if bits == 4:
        return halves
    place = 1 << torch.arange(GROUP, dtype=torch.uint8, device=codes.device)
    signs = ((padded >> 4).reshape(codes.shape[0], groups, GROUP) * place).sum(-1, dtype=torch.uint8)
    return torch.cat([halves, signs], dim=1)


def unpack(packed: UInt8[Tensor, "out bytes"], bits: int, in_features: int) -> UInt8[Tensor, "out in"]:
    """The inverse of `pack`."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_bytes(in_features, bits):
        raise UserError(
            f"packed must be uint8 (out, {packed_bytes(in_features, bits)}) for {in_features} inputs at {bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    groups = -(-in_features // GROUP)
    halves = packed[:, : groups * 4]
    codes = torch.stack([halves & 15, halves >> 4], dim=-1).flatten(1)
    if bits == 5:
        place = torch.arange(GROUP, dtype=torch.uint8, device=packed.device)
        codes = codes | (((packed[:, groups * 4 :].unsqueeze(-1) >> place) & 1) << 4).flatten(1)
    return codes[:, :in_features].contiguous()


def _check_bits(bits: int) -> None:
    if bits not in (4, 5):
        raise UserError(f"packed weights have 4 or 5 bits, got {bits}")


def _column(offset: Tensor, out_features: int) -> Tensor:
    if offset.is_floating_point() or offset.numel() != out_features:
        raise UserError(f"offset must be {out_features} integers, one an output channel, got {offset.dtype} {tuple(offset.shape)}")
    return offset.reshape(out_features, 1).to(torch.int32)


def _check_exponents(exponent: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    low, high = _FLOATS[dtype]
    outside = (magnitude != 0) & ((exponent < low) | (exponent > high))
    if outside.any():
        row, column = (int(i) for i in outside.nonzero()[0])
        raise UserError(
            f"weight[{row}, {column}] = ±2^{int(exponent[row, column])} does not fit {dtype}, whose powers of two run from 2^{low} to 2^{high}"
        )


def _explain(value: Tensor, wrong: Tensor, bits: int, offset: Tensor | None) -> str:
    row, column = (int(i) for i in wrong.nonzero()[0])
    shift = 0 if offset is None else int(offset.reshape(-1)[row])
    lowest = shift - (2 ** (bits - 1) - 2)
    return (
        f"weight[{row}, {column}] = {value[row, column].item()!r} is no {bits}-bit code: "
        f"allowed are 0 and ±2^p with integer p from {lowest} to {shift} in this row"
    )
