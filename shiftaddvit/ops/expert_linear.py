"""A linear of one or two experts as ops of whole blocks take it: what is checked of it, and its router as kernels read it."""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from .norm_linear.reference import route_rows

Linear = tuple[Float[Tensor, "experts out in"], Float[Tensor, "experts out"], Tensor | None]
"""Weight, bias and, with two experts, the router: (2, in), or its `route_rows`."""


def check_linear(linear: Linear, inputs: int, outputs: tuple[int, ...], name: str) -> None:
    """UserError for another shape than (1 or 2 experts, one of `outputs`, `inputs`), or a router where there is nothing to route."""
    weight, bias, router = linear
    count = weight.shape[0]
    if weight.dim() != 3 or count not in (1, 2) or weight.shape[1] not in outputs or weight.shape[2] != inputs:
        raise UserError(f"{name} must have a weight (1 or 2 experts, {' or '.join(map(str, outputs))}, {inputs}), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:2]:
        raise UserError(f"{name} must have a bias {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    if (router is not None) != (count == 2) or (router is not None and tuple(router.shape) not in ((2, inputs), (16, inputs))):
        got = None if router is None else tuple(router.shape)
        raise UserError(f"{name} needs a router of (2, {inputs}) or its `route_rows` for two experts, and none for one, got {count} and {got}")


def ready_routers(routers: tuple[Tensor | None, ...], dtype: torch.dtype, pdl: bool) -> tuple[tuple[Tensor | None, ...], bool]:
    """Routers as kernels read them, and whether launches may still overlap: what is made ready only now must be waited for."""
    ready = tuple(route_rows(router, dtype) if router is not None and len(router) == 2 else router for router in routers)
    return ready, pdl and all(one is other for one, other in zip(routers, ready, strict=True))
