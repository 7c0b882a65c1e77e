"""MatAdd written out. These products multiply for convenience by factors that are two constants; `add_literally` only adds."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ..bits import unpack_bits


def codes(words: Int32[Tensor, "B h N words"], r: int, low: float, high: float, dtype: torch.dtype) -> Float[Tensor, "B h N r"]:
    """The codes themselves: `high` where the bit is set, `low` elsewhere."""
    return torch.where(unpack_bits(words, r).bool(), high, low).to(dtype)


def key_value(
    words: Int32[Tensor, "B h N words"], values: Float[Tensor, "B h N d"], r: int, low: float, high: float
) -> Float[Tensor, "B h r d"]:
    """Σ_j code_jᵀ v_j, summed in float32 and rounded once."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (codes(words, r, low, high, wide).transpose(-2, -1) @ values.to(wide)).to(values.dtype)


def query_context(
    words: Int32[Tensor, "B h N words"], context: Float[Tensor, "B h r d"], low: float, high: float
) -> Float[Tensor, "B h N d"]:
    """code_i · context for every token."""
    wide = torch.float64 if context.dtype == torch.float64 else torch.float32
    return (codes(words, context.shape[-2], low, high, wide) @ context.to(wide)).to(context.dtype)


def add_literally(words: Int32[Tensor, "B h N words"], values: Float[Tensor, "B h N d"], r: int) -> Float[Tensor, "B h r d"]:
    """Σ_j code_jᵀ v_j for {0, 1} codes with additions alone: each row of v is added to the sums whose bit it has."""
    bits = unpack_bits(words, r).bool()
    total = torch.zeros(*values.shape[:2], r, values.shape[-1], dtype=values.dtype, device=values.device)
    for j in range(values.shape[2]):
        chosen = bits[:, :, j].unsqueeze(-1)
        total = torch.where(chosen, total + values[:, :, j].unsqueeze(2), total)
    return total
