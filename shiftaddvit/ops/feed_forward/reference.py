"""The formula."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    router1: Tensor | None, router2: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    a = F.layer_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), eps)
    hidden = _routed(a, weight1, bias1, router1).relu()
    return (x.float() + _routed(hidden, weight2, bias2, router2)).to(x.dtype)


def _routed(a: Tensor, weight: Tensor, bias: Tensor, router: Tensor | None) -> Tensor:
    """Each row through its expert; the router sees float32, the experts their own dtype."""
    y = [(a.to(w.dtype) @ w.t()).float() + b.float() for w, b in zip(weight, bias, strict=True)]
    if router is None:
        return y[0]
    logits = a @ router.float().t()
    return torch.where((logits[:, 1] > logits[:, 0]).unsqueeze(-1), y[1], y[0])
