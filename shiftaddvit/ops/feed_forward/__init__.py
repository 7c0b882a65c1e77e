"""A whole feed-forward in one kernel: x + Expert(relu(Expert(LayerNorm(x)))), its hidden units never in memory.

Each linear takes one expert, or two and a router: then every row goes to the expert with the larger logit, computed in float32, both
products are accumulated and the row keeps one. For inference: no gradient.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference


class Feed(NamedTuple):
    """The weights of a feed-forward, for this op and for those that end with one."""

    norm_weight: Float[Tensor, "C"]
    norm_bias: Float[Tensor, "C"]
    weight1: Float[Tensor, "E hidden C"]
    bias1: Float[Tensor, "E hidden"]
    weight2: Float[Tensor, "E C hidden"]
    bias2: Float[Tensor, "E C"]
    router1: Float[Tensor, "2 C"] | None = None
    """float32; None for one expert."""
    router2: Float[Tensor, "2 hidden"] | None = None
    """Likewise."""

    def check(self, x: Tensor) -> "Feed":
        """The same, contiguous; UserError naming what does not fit rows like those of x."""
        c, hidden = x.shape[-1], self.weight1.shape[-2]
        if c not in (16, 32, 64, 128) or hidden % 64:
            raise UserError(f"feed_forward takes 16, 32, 64 or 128 channels and hidden units in multiples of 64, got {c} and {hidden}")
        for name, weight, bias, router, shape in (
            ("1", self.weight1, self.bias1, self.router1, (hidden, c)), ("2", self.weight2, self.bias2, self.router2, (c, hidden)),
        ):  # fmt: skip
            count = weight.shape[0]
            if weight.dim() != 3 or tuple(weight.shape[1:]) != shape or count not in (1, 2) or weight.dtype != x.dtype:
                raise UserError(f"weight{name} must be {x.dtype} (1 or 2, {shape[0]}, {shape[1]}), got {weight.dtype} {tuple(weight.shape)}")
            if bias.shape != weight.shape[:2]:
                raise UserError(f"bias{name} must be {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
            if (router is not None) != (count == 2) or (router is not None and router.shape != (2, shape[1])):
                raise UserError(f"two experts need router{name} (2, {shape[1]}) and one expert none, got {count} experts")
        same_device(x=x, **self._asdict())
        return Feed(*(part.contiguous() if part is not None else None for part in self))


def feed_forward(x: Float[Tensor, "*batch C"], feed: Feed, eps: float, backend: Backend = "auto") -> Float[Tensor, "*batch C"]:
    """x + fc2(relu(fc1(LayerNorm(x)))). C is 16, 32, 64 or 128, the hidden width a multiple of 64."""
    y = torch.ops.shiftaddvit.feed_forward(x.reshape(-1, x.shape[-1]).contiguous(), list(feed.check(x)), eps, backend)
    return y.reshape(x.shape)


@torch.library.custom_op("shiftaddvit::feed_forward", mutates_args=(), schema="(Tensor x, Tensor?[] feed, float eps, str backend) -> Tensor")
def _feed_forward(x, feed, eps, backend):
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.feed_forward(x, *feed, eps)
    return reference.feed_forward(x, *feed, eps)


@_feed_forward.register_fake
def _(x, feed, eps, backend):
    return torch.empty_like(x)
