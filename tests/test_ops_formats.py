"""Codes of power-of-two weights: exact decodings, packing, and errors that name the value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftaddvit.errors import UserError
from shiftaddvit.ops.matshift.formats import (
    channel_scale,
    decode,
    decode_e5m2,
    decode_int8,
    encode,
    pack,
    packed_bytes,
    unpack,
)


def all_codes(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    return codes[codes != 2 ** (bits - 1)].reshape(1, -1)  # negative zero is never written


def test_four_bit_codes_decode_to_their_table():
    positive = [0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    expected = torch.tensor([positive + [-v for v in positive[1:]]])
    assert torch.equal(decode(all_codes(4), 4), expected)


def test_five_bit_codes_decode_to_their_table():
    positive = [0.0] + [2.0**p for p in range(-14, 1)]
    expected = torch.tensor([positive + [-v for v in positive[1:]]])
    assert torch.equal(decode(all_codes(5), 5), expected)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encode_inverts_decode_in_every_dtype_with_offsets(bits, dtype):
    codes = all_codes(bits).expand(5, -1).contiguous()
    offset = torch.tensor([[-6], [-1], [0], [2], [7]], dtype=torch.int32)
    weight = decode(codes, bits, offset, dtype)
    assert weight.dtype == dtype
    assert torch.equal(encode(weight, bits, offset), codes)
    assert torch.equal(weight.float(), decode(codes, bits) * 2.0 ** offset.float())


def test_golden_packed_bytes():
    codes4 = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    assert pack(codes4, 4).tolist() == [[0x21, 0x43, 0x65, 0x87, 0x09, 0, 0, 0]]
    codes5 = torch.tensor([[1, 18, 3, 20, 5, 22, 7, 24]], dtype=torch.uint8)
    assert pack(codes5, 5).tolist() == [[0x21, 0x43, 0x65, 0x87, 0b10101010]]
    twice = torch.cat([codes5, codes5], dim=1)
    assert pack(twice, 5).tolist() == [[0x21, 0x43, 0x65, 0x87] * 2 + [0b10101010] * 2]


@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([4, 5]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_unpack_inverts_pack(columns, rows, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_pack_takes_empty_and_non_contiguous_codes():
    assert pack(torch.empty(3, 0, dtype=torch.uint8), 5).shape == (3, 0)
    assert unpack(torch.empty(0, 10, dtype=torch.uint8), 5, 13).shape == (0, 13)
    codes = torch.randint(0, 16, (11, 6), dtype=torch.uint8).t()
    assert torch.equal(unpack(pack(codes, 4), 4, 11), codes)


def test_int8_decoding_times_its_scale_is_the_weight():
    codes = all_codes(4).expand(3, -1)
    offset = torch.tensor([[0], [-3], [4]])
    values, scale = decode_int8(codes, offset)
    assert values.dtype == torch.int8 and values.abs().max() == 64
    assert torch.equal(values.float() * scale[:, None], decode(codes, 4, offset))


def test_five_bit_code_is_an_e5m2_byte_and_a_float16():
    codes = all_codes(5)
    assert torch.equal(decode_e5m2(codes).float(), decode(codes, 5))
    as_half = (decode_e5m2(codes).view(torch.uint8).to(torch.int16) << 8).view(torch.float16)
    assert torch.equal(as_half.float(), decode(codes, 5))


def test_channel_scale_is_two_to_the_offset():
    assert torch.equal(channel_scale(torch.tensor([[-20], [0], [5]]), 3), torch.tensor([2.0**-20, 1.0, 32.0]))


@pytest.mark.parametrize("value", [0.75, 2.0, 2.0**-15, float("inf"), float("nan"), 1e-42])
def test_encode_names_the_first_value_that_has_no_code(value):
    weight = torch.ones(2, 3)
    weight[1, 2] = value
    with pytest.raises(UserError, match=r"weight\[1, 2\].*2\^p.*-14 to 0"):
        encode(weight, 5)


def test_decode_refuses_exponents_that_float16_cannot_hold():
    codes = torch.tensor([[1]], dtype=torch.uint8)
    with pytest.raises(UserError, match="2\\^-34 does not fit torch.float16"):
        decode(codes, 5, torch.tensor([[-20]]), torch.float16)


def test_other_widths_and_shapes_are_refused():
    with pytest.raises(UserError, match="4 or 5 bits, got 3"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 3)
    with pytest.raises(UserError, match="packed must be uint8"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 5, 8)
    with pytest.raises(UserError, match="offset must be 2 integers"):
        encode(torch.ones(2, 2), 4, torch.zeros(3, 1, dtype=torch.int32))


def test_negative_zero_encodes_as_zero():
    assert encode(torch.tensor([[-0.0]]), 4).item() == 0
