"""The block from the references of the two ops that it stands for."""

from torch import Tensor

from ..linear_attention import reference


def attn_block(
    x: Tensor, eps: float, gamma: Tensor, beta: Tensor, weight1: Tensor, bias1: Tensor, router1: Tensor | None, conv: Tensor | None,
    weight2: Tensor, bias2: Tensor, router2: Tensor | None, heads: int, rule: str, codes: str, local: str, context_mean: bool,
    output_unit: bool,
) -> Tensor:  # fmt: skip
    """x + proj(mix(encode(LayerNorm(x)))), rounded where the two ops write."""
    queries, v, context, v_sum, _, k_sum = reference.encode(
        x, gamma, beta, eps, weight1, bias1, router1, None, heads, rule, codes, local == "mean", False, 1
    )
    output = "l2" if output_unit else "none"
    return reference.mix(queries, v, context, v_sum, k_sum, conv, weight2, bias2, router2, x, codes, local, context_mean, output, 1.0, 0)[0]
