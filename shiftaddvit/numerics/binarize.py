"""Binary codes of queries and keys ("Quant"; ShiftAddViT section 4.1), with a straight-through gradient."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Threshold = Literal["token", "zero", "tensor"]
Codes = Literal["zero-one", "plus-minus"]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, threshold, low, window):
        ctx.save_for_backward(x, threshold)
        ctx.scale, ctx.window = 1.0 - low, window
        return torch.where(torch.isnan(x), x, torch.where(x > threshold, 1.0, low).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        low, high = ctx.window
        # The published window [0, 1] looks at the value itself; ours at the distance from the threshold.
        distance = x if low == 0 else x - threshold
        return grad * ((distance >= low) & (distance <= high)) * ctx.scale, None, None, None


def binary_threshold(x: Float[Tensor, "B h N d"], rule: Threshold) -> Float[Tensor, "..."]:
    """The threshold of each code. `token`: the mean over d, so a token's code depends on that token alone; `zero`: 0;
    `tensor`: one mean over B, h, N and d as published, which makes an image's output depend on its batch-mates."""
    if rule == "token":
        return x.mean(dim=-1, keepdim=True)
    if rule == "tensor":
        return x.mean()
    if rule == "zero":
        return x.new_zeros(())
    raise ValueError(f"threshold must be 'token', 'zero' or 'tensor', got {rule!r}")


def binarize(
    x: Float[Tensor, "B h N d"],
    threshold: Float[Tensor, "..."],
    codes: Codes = "zero-one",
    published_window: bool = False,
) -> Float[Tensor, "B h N d"]:
    """1[x > threshold] as {0, 1} or {−1, 1}. No gradient reaches the threshold.

    The gradient to `x` is passed straight through where |x − threshold| ≤ 1, or, with `published_window`, where 0 ≤ x ≤ 1; for {−1, 1}
    codes it is doubled, as their step is. NaN stays NaN.
    """
    if codes not in ("zero-one", "plus-minus"):
        raise ValueError(f"codes must be 'zero-one' or 'plus-minus', got {codes!r}")
    low = 0.0 if codes == "zero-one" else -1.0
    return _Step.apply(x, threshold.detach(), low, (0.0, 1.0) if published_window else (-1.0, 1.0))
