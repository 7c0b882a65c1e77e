"""The formula, from the references of its parts."""

import torch.nn.functional as F
from torch import Tensor

from ..feed_forward.reference import feed_forward
from ..linear_attention import reference as linear


def ray_transformer(
    x: Tensor, heads: int, norm_weight: Tensor, norm_bias: Tensor, eps: float, qkv: Tensor, proj: Tensor, proj_bias: Tensor | None,
    feed: list[Tensor | None], feed_eps: float, form: str, low: float, own: bool, context_mean: bool, unit: bool, conv: Tensor | None,
) -> Tensor:  # fmt: skip
    weight, bias = proj.unsqueeze(0), proj_bias.unsqueeze(0) if proj_bias is not None else None
    if form == "softmax":
        a = F.layer_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), eps).to(x.dtype)
        q, k, v = ((a @ part.t()).unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = (x.float() + (mixed @ proj.t()).float() + (proj_bias.float() if proj_bias is not None else 0)).to(x.dtype)
    else:
        codes = "float" if form == "float" else "plus-minus" if low < 0 else "zero-one"
        rule = "token" if form == "float" else form
        encoded = linear.encode(x, norm_weight, norm_bias, eps, qkv.unsqueeze(0), None, None, None, heads, rule, codes, False, False, 1)
        queries, v, context, v_sum, _, k_sum = encoded
        y, _ = linear.mix(
            queries, v, context, v_sum, k_sum, conv, weight, bias, None, x, codes, "own" if own else "none", context_mean, "l2" if unit else "none",
            1.0, 0,
        )  # fmt: skip
    return feed_forward(y.flatten(0, 1), *feed, feed_eps).view(x.shape)
