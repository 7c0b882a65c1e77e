"""What V source views see at the points of rays, through two linear layers (GNT, section 3): project, interpolate, transform, in one kernel.

Every point is projected into every view; colours and features are interpolated bilinearly (zero outside the picture), and go through
linear, ReLU, linear. Nothing wider than the result reaches memory. For inference: no gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from . import reference

GEOMETRY = 8
"""Channels of the second result: direction difference (3), dot product, mask, three zeros."""


def view_lookup(
    origin: Float[Tensor, "R 3"],
    direction: Float[Tensor, "R 3"],
    depths: Float[Tensor, "S"],
    project: Float[Tensor, "V 3 4"],
    centre: Float[Tensor, "V 3"],
    images: Float[Tensor, "V H W 4"],
    features: Float[Tensor, "V h w 32"],
    color_weight: Float[Tensor, "C 4"],
    feature_weight: Float[Tensor, "C 32"],
    bias: Float[Tensor, "C"],
    out_weight: Float[Tensor, "C C"],
    out_bias: Float[Tensor, "C"],
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "V RS C"], Float[Tensor, "V RS 8"], Float[Tensor, "RS C"]]:
    """(what each view sees, transformed; relative directions and mask; the maximum over the views) at origin + depth · direction.

    `project` takes a point (x, y, z, 1) to (pixel x · depth, pixel y · depth, depth), pixels at integers; `images` has RGB and one unused
    channel, and like `features`, `centre` and the weights' results is what the published projector reads. Channels of features: 16, 32 or
    64. `geometry` is (difference of the unit directions from the point to the target and to the source camera, normalised; their dot
    product; 1 where the view sees the point; 0, 0, 0). The geometry is computed in float32 from float32 cameras.
    """
    views, width = len(images), color_weight.shape[0]
    if width not in (16, 32, 64, 128) or features.shape[-1] not in (16, 32, 64):
        raise UserError(f"view_lookup takes 16, 32, 64 or 128 channels and features of 16, 32 or 64, got {width} and {features.shape[-1]}")
    expected = {
        "origin": (len(origin), 3), "direction": (len(origin), 3), "project": (views, 3, 4), "centre": (views, 3),
        "images": (views, *images.shape[1:3], 4), "features": (views, *features.shape[1:]), "color_weight": (width, 4),
        "feature_weight": (width, features.shape[-1]), "bias": (width,), "out_weight": (width, width), "out_bias": (width,),
    }  # fmt: skip
    given = dict(
        origin=origin, direction=direction, project=project, centre=centre, images=images, features=features, color_weight=color_weight,
        feature_weight=feature_weight, bias=bias, out_weight=out_weight, out_bias=out_bias,
    )  # fmt: skip
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise UserError(f"{name} must be {shape}, got {tuple(given[name].shape)}")
    kinds = {tensor.dtype for tensor in (images, features, color_weight, feature_weight, out_weight)}
    if len(kinds) > 1 or kinds.pop() not in (torch.float16, torch.bfloat16, torch.float32):
        raise UserError(f"images, features and weights must share one of float16, bfloat16, float32, got {images.dtype}, {features.dtype}, …")
    same_device(depths=depths, **given)
    tensors = (depths, *(given[name].contiguous() for name in given if name not in ("origin", "direction")))
    return torch.ops.shiftaddvit.view_lookup(origin.float().contiguous(), direction.float().contiguous(), *tensors, backend)


@torch.library.custom_op(
    "shiftaddvit::view_lookup",
    mutates_args=(),
    schema="(Tensor origin, Tensor direction, Tensor depths, Tensor project, Tensor centre, Tensor images, Tensor features, "
    "Tensor color_weight, Tensor feature_weight, Tensor bias, Tensor out_weight, Tensor out_bias, str backend) -> (Tensor, Tensor, Tensor)",
)
def _view_lookup(origin, direction, depths, project, centre, images, features, color_weight, feature_weight, bias, out_weight, out_bias, backend):
    arguments = (
        origin, direction, depths, project, centre, images, features, color_weight, feature_weight, bias, out_weight, out_bias,
    )  # fmt: skip
    if choose_backend(backend, images) == "triton":
        from . import triton as kernels

        return kernels.view_lookup(*arguments)
    return reference.view_lookup(*arguments)


@_view_lookup.register_fake
def _(origin, direction, depths, project, centre, images, features, color_weight, feature_weight, bias, out_weight, out_bias, backend):
    points, width = origin.shape[0] * depths.shape[0], out_weight.shape[0]
    views = images.shape[0]
    return (
        images.new_empty(views, points, width), images.new_empty(views, points, GEOMETRY), images.new_empty(points, width),
    )  # fmt: skip
