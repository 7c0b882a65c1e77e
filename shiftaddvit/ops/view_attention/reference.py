"""The formula."""

import torch.nn.functional as F
from torch import Tensor

from ..feed_forward.reference import feed_forward


def view_attention(
    q: Tensor, x: Tensor, geometry: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, query_weight: Tensor, key_weight: Tensor,
    near_weight: Tensor, hidden_bias: Tensor, pos_weight: Tensor, pos_bias: Tensor, logit_weight: Tensor, value_weight: Tensor,
    pos_value: Tensor, out_weight: Tensor, out_bias: Tensor, feed: list[Tensor | None], feed_eps: float,
) -> Tensor:  # fmt: skip
    dtype = q.dtype
    a = F.layer_norm(q.float(), q.shape[-1:], norm_weight.float(), norm_bias.float(), eps).to(dtype)
    near = ((geometry @ pos_weight.t()).float() + pos_bias.float()).relu().to(dtype)  # (V, N, 16)
    query = hidden_bias.float() - (a @ query_weight.t()).float()
    hidden = ((x @ key_weight.t()).float() + (near @ near_weight.t()).float() + query).relu().to(dtype)
    logits = (hidden @ logit_weight.t()).float().masked_fill(geometry[..., 4:5] == 0, -1e9)
    value = (x @ value_weight.t()).float() + (near @ pos_value.t()).float()
    mixed = (logits.softmax(dim=0) * value).sum(dim=0).to(dtype)
    y = (q.float() + (mixed @ out_weight.t()).float() + out_bias.float()).to(dtype)
    return feed_forward(y, *feed, feed_eps) if feed else y
