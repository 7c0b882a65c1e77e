"""Binary codes as bits: code i of a token in bit i mod 32 of its word i // 32."""

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor


def pack_bits(bits: Bool[Tensor, "*batch r"]) -> Int32[Tensor, "*batch words"]:
    """Bools (…, r) as int32 words (…, ⌈r/32⌉); unused bits are 0."""
    padded = torch.nn.functional.pad(bits.long(), (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (padded << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: Int32[Tensor, "*batch words"], r: int) -> Int[Tensor, "*batch r"]:
    """The inverse, as integers 0 and 1."""
    return ((words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1).flatten(-2)[..., :r]
