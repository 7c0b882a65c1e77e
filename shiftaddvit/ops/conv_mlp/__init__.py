"""PVTv2's whole MLP: LayerNorm, fc1, depthwise 3×3 convolution, GELU, fc2, residual. For inference: no gradient.

Each linear is one matrix, or two of which every row takes one. The kernels are for few channels, whose hidden tensor costs far more to write
and read twice than everything else does: with 32 it is never written, with 64 once, in front of fc2. Others are better served by `norm_linear`,
`conv_gelu` and `norm_linear`. `fits` says which.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError

from ..backends import Backend, choose_backend, interpreting, overlapping, same_device
from ..expert_linear import Linear, check_linear, ready_routers
from . import reference
from .gluon import has_gluon

__all__ = ["conv_mlp", "fits"]

SIZES, WIDEST = {32: 256, 64: 512}, 64
"""What the kernels are written for: hidden channels by channels, and the most columns of a picture."""


def fits(x: Tensor, width: int, weight1: Tensor, conv: Tensor, weight2: Tensor) -> bool:
    """Whether the kernel takes tokens like x, of pictures `width` wide, with these weights: on a GPU of compute capability 9.0, in float16
    between the residuals (float16 or bfloat16), with 32 channels and 256 hidden ones or 64 and 512, and with a Triton that has Gluon."""
    halves = x.dtype in (torch.float16, torch.bfloat16) and {weight1.dtype, conv.dtype, weight2.dtype} == {torch.float16}
    sizes = SIZES.get(x.shape[-1]) == conv.shape[-1] and 1 <= width <= WIDEST
    return halves and sizes and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0) and not interpreting() and has_gluon()


def conv_mlp(
    x: Float[Tensor, "B N C"],
    height: int,
    width: int,
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    fc1: Linear,
    conv: tuple[Float[Tensor, "9 hidden"], Float[Tensor, "hidden"]],
    fc2: Linear,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "B N C"]:
    """x + fc2(GELU(conv3×3(fc1(LayerNorm(x))))) of tokens in raster order, N = height · width, zero outside the picture behind fc1.

    The result has the dtype of x. `conv` is as `conv_gelu` has it: filters, one a column, and bias. In the kernel the hidden values and the
    convolution's sums are float16, as `conv_gelu` keeps them; LayerNorm, routers, products and the residual are float32. `auto` is the
    kernel where it `fits`, else the reference. `pdl` overlaps the launch with the kernel before it, for chains in which every kernel is
    launched so.
    """
    if x.dim() != 3 or x.shape[1] != height * width:
        raise UserError(f"x must be (B, {height}·{width}, C), got {tuple(x.shape)}")
    channels, hidden = x.shape[2], conv[0].shape[-1]
    check_linear(fc1, channels, (hidden,), "fc1")
    check_linear(fc2, hidden, (channels,), "fc2")
    for name, vector, shape in (
        ("norm weight", norm[0], (channels,)), ("norm bias", norm[1], (channels,)), ("conv", conv[0], (9, hidden)), ("conv bias", conv[1], (hidden,)),
    ):  # fmt: skip
        if tuple(vector.shape) != shape:
            raise UserError(f"{name} must be {shape}, got {tuple(vector.shape)}")
    same_device(x=x, norm_weight=norm[0], fc1=fc1[0], router1=fc1[2], conv=conv[0], conv_bias=conv[1], fc2=fc2[0], router2=fc2[2])
    weights = tuple(t.contiguous() if t is not None else None for t in (*norm, *fc1, *conv, *fc2))
    pdl = overlapping(pdl, *norm, *fc1, *conv, *fc2)
    return torch.ops.shiftaddvit.conv_mlp(x.contiguous(), height, width, eps, *weights, pdl, backend)


@torch.library.custom_op(
    "shiftaddvit::conv_mlp",
    mutates_args=(),
    schema="(Tensor x, int height, int width, float eps, Tensor gamma, Tensor beta, Tensor weight1, Tensor bias1, Tensor? router1, "
    "Tensor conv, Tensor conv_bias, Tensor weight2, Tensor bias2, Tensor? router2, bool pdl, str backend) -> Tensor",
)
def _conv_mlp(x, height, width, eps, gamma, beta, weight1, bias1, router1, conv, conv_bias, weight2, bias2, router2, pdl, backend):
    kernel = choose_backend(backend, x) == "triton"
    if kernel and not fits(x, width, weight1, conv, weight2):
        if backend == "triton":
            raise UserError(
                "backend 'triton' cannot run: the kernels take float16 weights, 32 or 64 channels, eight times as many hidden ones, up to "
                f"{WIDEST} columns, a GPU of compute capability 9.0 and a Triton that has Gluon; use 'auto' or the ops that it is made of"
            )
        kernel = False
    if not kernel:
        return reference.conv_mlp(
            x, height, width, eps, gamma, beta, weight1, bias1, router1, conv, conv_bias, weight2, bias2, router2
        )
    from . import triton as kernels

    (router1, router2), pdl = ready_routers((router1, router2), torch.float16, pdl)
    return kernels.conv_mlp(x, height, width, eps, gamma, beta, weight1, bias1, router1, conv, conv_bias, weight2, bias2, router2, pdl)


@_conv_mlp.register_fake
def _(x, height, width, eps, gamma, beta, weight1, bias1, router1, conv, conv_bias, weight2, bias2, router2, pdl, backend):
    return torch.empty_like(x)
