"""A whole block of linear attention over binary codes: LayerNorm, q k v, Σ kᵀv, q · context, token convolution, projection, residual. For
inference: no gradient.

The same function as `attention_encode` and `attention_mix` together. The kernels are for narrow tokens, 32 or 64 channels in heads of 32, of
which q, k and v and merged heads cost far more to write and read than everything else: only x, twice, and a few contexts are read, and x is
written. `fits` says whether the kernels take a block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, interpreting, overlapping, same_device
from ..conv_mlp.gluon import has_gluon
from ..expert_linear import Linear, check_linear, ready_routers
from . import reference

__all__ = ["attn_block", "fits"]

HEAD, WIDEST_WINDOW = 32, 17
"""What the kernels are written for: the width of a head, and the widest token convolution, eight tokens to either side."""


def fits(x: Tensor, heads: int, qkv: Tensor, proj: Tensor, window: int, local: str = "own") -> bool:
    """Whether the kernels take tokens like x (B, N, C) with these weights, and a token convolution of so many tokens, 0 for none: on a GPU of
    compute capability 9.0, in float16 between the residuals (float16 or bfloat16), 32 channels in one head or 64 in two, with a Triton that
    has Gluon."""
    halves = x.dtype in (torch.float16, torch.bfloat16) and {qkv.dtype, proj.dtype} == {torch.float16}
    sizes = x.shape[2] in (32, 64) and heads * HEAD == x.shape[2] and window <= WIDEST_WINDOW and local in ("own", "none")
    return halves and sizes and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0) and not interpreting() and has_gluon()


def attn_block(
    x: Float[Tensor, "B N C"],
    heads: int,
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]],
    eps: float,
    qkv: Linear,
    conv: Float[Tensor, "h window"] | None,
    proj: Linear,
    rule: str = "token",
    codes: str = "zero-one",
    local: str = "own",
    context_mean: bool = True,
    output_unit: bool = True,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "B N C"]:
    """x + proj(normalised(local + q · Σ kᵀv / π) + token convolution of v), with binary codes of q and k, as `attention_mix` says it.

    The result has the dtype of x. `qkv` has 3C outputs, or 2C for shared queries and keys, then values. `rule` is a code's threshold, the
    token's mean (`token`) or zero; `codes` are `zero-one` or `plus-minus`; `local` is ½ of the token's own v (`own`) or of the mean of v (`mean`),
    or nothing. Rows are rounded to the weights' dtype where the two ops round them: behind LayerNorm, as q, k and v, and as merged heads. `auto`
    is the kernels where they fit, else the reference. `pdl` overlaps the launches with the kernels before them, for chains in which every
    kernel is launched so. UserError names what does not fit.
    """
    if x.dim() != 3:
        raise UserError(f"x must be (B, N, C), got {tuple(x.shape)}")
    channels = x.shape[2]
    for name, value, allowed in (
        ("rule", rule, ("token", "zero")), ("codes", codes, ("zero-one", "plus-minus")), ("local", local, ("own", "mean", "none")),
    ):  # fmt: skip
        if value not in allowed:
            raise unknown(name, value, allowed)
    if heads < 1 or channels % heads:
        raise UserError(f"heads must divide {channels} channels, got {heads}")
    check_linear(qkv, channels, (3 * channels, 2 * channels), "qkv")
    check_linear(proj, channels, (channels,), "proj")
    for name, vector in (("norm weight", norm[0]), ("norm bias", norm[1])):
        if tuple(vector.shape) != (channels,):
            raise UserError(f"{name} must be {(channels,)}, got {tuple(vector.shape)}")
    if conv is not None and (conv.dim() != 2 or conv.shape[0] != heads or conv.shape[1] % 2 == 0):
        raise UserError(f"conv must be ({heads}, odd window), got {tuple(conv.shape)}")
    same_device(x=x, norm_weight=norm[0], qkv=qkv[0], router=qkv[2], conv=conv, proj=proj[0], proj_router=proj[2])
    weights = tuple(t.contiguous() if t is not None else None for t in (*norm, *qkv, conv, *proj))
    pdl = overlapping(pdl, *norm, *qkv, conv, *proj)
    return torch.ops.shiftaddvit.attn_block(
        x.contiguous(), eps, *weights, heads, rule, codes, local, context_mean, output_unit, pdl, backend
    )


@torch.library.custom_op(
    "shiftaddvit::attn_block",
    mutates_args=(),
    schema="(Tensor x, float eps, Tensor gamma, Tensor beta, Tensor weight1, Tensor bias1, Tensor? router1, Tensor? conv, Tensor weight2, "
    "Tensor bias2, Tensor? router2, int heads, str rule, str codes, str local, bool context_mean, bool output_unit, bool pdl, str backend) -> Tensor",
)
def _attn_block(
    x, eps, gamma, beta, weight1, bias1, router1, conv, weight2, bias2, router2, heads, rule, codes, local, context_mean, output_unit, pdl, backend,
):  # fmt: skip
    form = (heads, rule, codes, local, context_mean, output_unit)
    kernel = choose_backend(backend, x) == "triton"
    if kernel and not fits(x, heads, weight1, weight2, 0 if conv is None else conv.shape[1], local):
        if backend == "triton":
            raise UserError(
                "backend 'triton' cannot run: the kernels take float16 weights, 32 channels in one head or 64 in two, a token convolution of up "
                f"to {WIDEST_WINDOW} tokens, local 'own' or 'none', a GPU of compute capability 9.0 and a Triton that has Gluon; use 'auto' or the "
                "ops that it is made of"
            )
        kernel = False
    if not kernel:
        return reference.attn_block(x, eps, gamma, beta, weight1, bias1, router1, conv, weight2, bias2, router2, *form)
    from . import triton as kernels

    (router1, router2), pdl = ready_routers((router1, router2), torch.float16, pdl)
    return kernels.attn_block(x, eps, gamma, beta, weight1, bias1, router1, conv, weight2, bias2, router2, *form, pdl)


@_attn_block.register_fake
def _(
    x, eps, gamma, beta, weight1, bias1, router1, conv, weight2, bias2, router2, heads, rule, codes, local, context_mean, output_unit, pdl, backend,
):  # fmt: skip
    return torch.empty_like(x)
