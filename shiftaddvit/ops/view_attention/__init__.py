"""GNT's view transformer in one kernel: LayerNorm, subtraction attention over V views, output projection, residual, feed-forward.

For every point and channel: out = q + out_weight · Σ_v softmax_v(logits_v) · (value_v + pos_v) + out_bias, with
logits_v = logit_weight · relu(key_weight · x_v + near_weight · r_v − query_weight · LN(q) + hidden_bias), where x_v is what view v sees,
r_v = relu(pos_weight · geometry_v + pos_bias), value_v = value_weight · x_v and pos_v = pos_value · r_v.

The published layer is this, multiplied out (`fold` in nvs/engine): its keys, queries and positions meet in the 8 units of a hidden layer
before anything is non-linear, so keys of full width are never made. A view that does not see the point has logits −1e9; a point that
no view sees gets equal weights. For inference: no gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, same_device
from ..feed_forward import Feed
from . import reference

UNITS = 16
"""Hidden units, the published width/8 padded with zeros to what matrix units take."""


def view_attention(
    q: Float[Tensor, "N C"],
    x: Float[Tensor, "V N C"],
    geometry: Float[Tensor, "V N 8"],
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    query_weight: Float[Tensor, "16 C"],
    key_weight: Float[Tensor, "16 C"],
    near_weight: Float[Tensor, "16 16"],
    hidden_bias: Float[Tensor, "16"],
    pos_weight: Float[Tensor, "16 8"],
    pos_bias: Float[Tensor, "16"],
    logit_weight: Float[Tensor, "C 16"],
    value_weight: Float[Tensor, "C C"],
    pos_value: Float[Tensor, "C 16"],
    out_weight: Float[Tensor, "C C"],
    out_bias: Float[Tensor, "C"],
    feed: Feed | None = None,
    feed_eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "N C"]:
    """The residual stream after the attention, and after the block's feed-forward if it is given. `geometry` has the mask in channel 4
    (`view_lookup`)."""
    width = q.shape[-1]
    if width not in (16, 32, 64, 128):
        raise UserError(f"view_attention takes 16, 32, 64 or 128 channels, got {width}")
    weights = dict(
        query_weight=query_weight, key_weight=key_weight, near_weight=near_weight, pos_weight=pos_weight, logit_weight=logit_weight,
        value_weight=value_weight, pos_value=pos_value, out_weight=out_weight,
    )  # fmt: skip
    shapes = {
        "query_weight": (UNITS, width), "key_weight": (UNITS, width), "near_weight": (UNITS, UNITS), "pos_weight": (UNITS, 8),
        "logit_weight": (width, UNITS), "value_weight": (width, width), "pos_value": (width, UNITS), "out_weight": (width, width),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape or weights[name].dtype != q.dtype:
            raise UserError(f"{name} must be {q.dtype} {shape}, got {weights[name].dtype} {tuple(weights[name].shape)}")
    if x.dim() != 3 or x.shape[1:] != q.shape or geometry.shape != (*x.shape[:2], 8) or not x.dtype == geometry.dtype == q.dtype:
        raise UserError(
            f"x must be (V, {len(q)}, {width}) and geometry (V, {len(q)}, 8) of {q.dtype}, got {tuple(x.shape)} and {tuple(geometry.shape)}"
        )
    if len(x) == 0:
        raise UserError("view attention needs at least one view")
    same_device(q=q, x=x, geometry=geometry, hidden_bias=hidden_bias, **weights)
    return torch.ops.shiftaddvit.view_attention(
        q.contiguous(), x.contiguous(), geometry.contiguous(), *norm, eps, query_weight, key_weight, near_weight, hidden_bias, pos_weight,
        pos_bias, logit_weight, value_weight, pos_value, out_weight, out_bias, list(feed.check(q)) if feed is not None else [], feed_eps, backend,
    )  # fmt: skip


@torch.library.custom_op(
    "shiftaddvit::view_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor x, Tensor geometry, Tensor norm_weight, Tensor norm_bias, float eps, Tensor query_weight, Tensor key_weight, "
    "Tensor near_weight, Tensor hidden_bias, Tensor pos_weight, Tensor pos_bias, Tensor logit_weight, Tensor value_weight, "
    "Tensor pos_value, Tensor out_weight, Tensor out_bias, Tensor?[] feed, float feed_eps, str backend) -> Tensor",
)
def _view_attention(
    q, x, geometry, norm_weight, norm_bias, eps, query_weight, key_weight, near_weight, hidden_bias, pos_weight, pos_bias, logit_weight,
    value_weight, pos_value, out_weight, out_bias, feed, feed_eps, backend,
):  # fmt: skip
    arguments = (
        q, x, geometry, norm_weight, norm_bias, eps, query_weight, key_weight, near_weight, hidden_bias, pos_weight, pos_bias,
        logit_weight, value_weight, pos_value, out_weight, out_bias, feed, feed_eps,
    )  # fmt: skip
    if choose_backend(backend, q) == "triton":
        from . import triton as kernels

        return kernels.view_attention(*arguments)
    return reference.view_attention(*arguments)


@_view_attention.register_fake
def _(q, *_rest):
    return torch.empty_like(q)
