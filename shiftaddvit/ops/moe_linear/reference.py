"""A mixture of linear experts, every expert on every token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def moe_linear(
    x: Float[Tensor, "M K"],
    index: Int[Tensor, "M"],
    gate: Float[Tensor, "M"] | None,
    weight: Float[Tensor, "E N K"],
    bias: Float[Tensor, "E N"] | None,
) -> Float[Tensor, "M N"]:
    """gate · (x W_eᵀ + b_e) with e the row's expert, in float32, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros(x.shape[0], weight.shape[1], dtype=wide, device=x.device)
    for expert in range(weight.shape[0]):
        product = x.to(wide) @ weight[expert].to(wide).t()
        if bias is not None:
            product = product + bias[expert]
        y = torch.where((index == expert).unsqueeze(1), product, y)
    return (y * gate.to(wide).unsqueeze(1) if gate is not None else y).to(x.dtype)


def route(x: Float[Tensor, "M K"], router: Float[Tensor, "E K"]) -> Int[Tensor, "M"]:
    """argmax of the router's logits in float32; the first expert on a tie."""
    return (x.float() @ router.float().t()).argmax(1).to(torch.int8)
