"""GNT's query layer in one kernel: linear over (query, encoded position, encoded direction), ReLU, linear.

The encoding of a position (NeRF, equation 4: x, then sin and cos of 2^i x, i < 10) is made in registers. The direction is one a ray, so
its part of the first linear comes ready, with the bias. For inference: no gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference

ENCODED = 64
"""Channels of an encoded position, 63 padded with a zero."""


def ray_query(
    q: Float[Tensor, "RS C"],
    origin: Float[Tensor, "R 3"],
    direction: Float[Tensor, "R 3"],
    depths: Float[Tensor, "S"],
    query_weight: Float[Tensor, "C C"],
    place_weight: Float[Tensor, "C 64"],
    heading: Float[Tensor, "R C"],
    out_weight: Float[Tensor, "C C"],
    out_bias: Float[Tensor, "C"],
    backend: Backend = "auto",
) -> Float[Tensor, "RS C"]:
    """out_weight · relu(query_weight · q + place_weight · encode(origin + depth · direction) + heading) + out_bias."""
    width = q.shape[-1]
    if width not in (16, 32, 64, 128) or q.shape != (len(origin) * len(depths), width):
        raise UserError(f"q must be ({len(origin)} · {len(depths)}, 16, 32, 64 or 128), got {tuple(q.shape)}")
    for name, tensor, shape in (
        ("query_weight", query_weight, (width, width)), ("place_weight", place_weight, (width, ENCODED)),
        ("out_weight", out_weight, (width, width)),
    ):  # fmt: skip
        if tuple(tensor.shape) != shape or tensor.dtype != q.dtype:
            raise UserError(f"{name} must be {q.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if heading.shape != (len(origin), width):
        raise UserError(f"heading must be ({len(origin)}, {width}), got {tuple(heading.shape)}")
    same_device(q=q, origin=origin, direction=direction, depths=depths, query_weight=query_weight, heading=heading)
    return torch.ops.shiftaddvit.ray_query(
        q.contiguous(), origin.float().contiguous(), direction.float().contiguous(), depths, query_weight, place_weight,
        heading.float().contiguous(), out_weight, out_bias, backend,
    )  # fmt: skip


@torch.library.custom_op(
    "shiftaddvit::ray_query",
    mutates_args=(),
    schema="(Tensor q, Tensor origin, Tensor direction, Tensor depths, Tensor query_weight, Tensor place_weight, Tensor heading, "
    "Tensor out_weight, Tensor out_bias, str backend) -> Tensor",
)
def _ray_query(q, origin, direction, depths, query_weight, place_weight, heading, out_weight, out_bias, backend):
    arguments = (q, origin, direction, depths, query_weight, place_weight, heading, out_weight, out_bias)
    if choose_backend(backend, q) == "triton":
        from . import triton as kernels

        return kernels.ray_query(*arguments)
    return reference.ray_query(*arguments)


@_ray_query.register_fake
def _(q, *_rest):
    return torch.empty_like(q)
