"""A block's linear attention in two ops (ShiftAddViT section 4.1).

`attention_encode`: LayerNorm, q k v (one expert or two and a router), binary codes of q and k, Σ_j k_jᵀ v_j.
`attention_mix`: local term + q · context/π, unit length, token convolution of v, projection (one expert or two), residual.

Between the two lie v, one bit a channel of q, and partial context sums. Thresholds look at one token, or are given; none depends on
the batch. For inference: no gradient.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from shiftaddvit.errors import UserError, unknown

from ..backends import Backend, choose_backend, mixable, overlapping, same_device
from . import reference

Rule = Literal["token", "zero", "given"]
Codes = Literal["zero-one", "plus-minus", "float"]
Local = Literal["own", "mean", "none"]


class Encoded(NamedTuple):
    """What the second op needs of the first."""

    queries: Tensor
    """int32 (B, h, N, ⌈d/32⌉), channel i in bit i mod 32 of word i // 32; or unit-length queries (B, h, N, d)."""
    v: Float[Tensor, "B N C"]
    """Values, heads merged: a view of rows of q, k and v, so that its own rows lie 3C (or 2C) apart."""
    context: Float[Tensor, "B parts h d d"]
    """Σ_j k_jᵀ v_j of each part of the tokens, float32."""
    v_sum: Float[Tensor, "B parts h d"]
    """Σ_j v_j of each part, float32; empty unless asked for."""
    choice: Int8[Tensor, "B N"]
    """The expert of every token; empty for one expert."""
    k_sum: Float[Tensor, "B parts h d"]
    """Σ_j k_j of each part, float32; empty unless asked for."""


def attention_encode(
    x: Float[Tensor, "B N C"],
    weight: Float[Tensor, "experts 3C C"],
    heads: int,
    bias: Float[Tensor, "experts 3C"] | None = None,
    norm: tuple[Float[Tensor, "C"], Float[Tensor, "C"]] | None = None,
    eps: float = 1e-6,
    router: Float[Tensor, "2 C"] | Float[Tensor, "16 C"] | None = None,
    rule: Rule = "token",
    threshold: Float[Tensor, "2 h"] | None = None,
    codes: Codes = "zero-one",
    v_sum: bool = False,
    k_sum: bool = False,
    pdl: bool = False,
    backend: Backend = "auto",
) -> Encoded:
    """LayerNorm, q k v, codes and context sums. `weight` with 2C outputs holds shared queries and keys, then values.

    A code is 1[q/‖q‖ > threshold], with the threshold the token's mean, zero, or `threshold` (2, heads) for queries and keys.
    `codes` is `zero-one`, `plus-minus`, or `float` for unit-length q and k themselves. `v_sum` is needed for the local term `mean`,
    `k_sum` for normalisation by similarity.
    """
    batch, tokens, width = x.shape
    if weight.dim() == 2:
        weight, bias = weight.unsqueeze(0), bias.unsqueeze(0) if bias is not None else None
    _choices(rule=(rule, ("token", "zero", "given")), codes=(codes, ("zero-one", "plus-minus", "float")))
    _head_width(width, heads)
    if weight.shape[1:] not in ((3 * width, width), (2 * width, width)) or not mixable(weight, x):
        raise UserError(f"weight must be (experts, {3 * width} or {2 * width}, {width}) for {x.dtype}, got {_about(weight)}")
    _experts(weight, bias, router, width)
    if (rule == "given") != (threshold is not None) or (threshold is not None and threshold.shape != (2, heads)):
        raise UserError(f"threshold (2, {heads}) goes with rule 'given' and only with it, got rule {rule!r} and {_about(threshold)}")
    same_device(x=x, weight=weight, bias=bias, router=router, threshold=threshold)
    x = x if x.stride(-1) == 1 and x.stride(0) == tokens * x.stride(1) else x.contiguous()
    result = torch.ops.shiftaddvit.attention_encode(
        x, *(norm or (None, None)), eps, weight.contiguous(), bias, router, threshold, heads, rule, codes, v_sum, k_sum,
        _parts(backend, x, heads), overlapping(pdl, weight), backend,
    )  # fmt: skip
    choice = result[4].reshape(batch, tokens) if router is not None else result[4]
    return Encoded(*result[:4], choice, result[5])


def attention_mix(
    encoded: Encoded,
    weight: Float[Tensor, "experts C C"],
    bias: Float[Tensor, "experts C"] | None = None,
    router: Float[Tensor, "2 C"] | Float[Tensor, "16 C"] | None = None,
    residual: Float[Tensor, "B N C"] | None = None,
    conv: Float[Tensor, "h window"] | None = None,
    codes: Codes = "zero-one",
    local: Local = "own",
    context_mean: bool = True,
    output_unit: bool = True,
    similarity: bool = False,
    factor: float = 1.0,
    prefix: int = 0,
    pdl: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B N C"], Int8[Tensor, "B N"]]:
    """residual + Expert(normalised(local + q·context·factor/π) + token convolution), and the expert of every token.

    `local` is ½ of the token's own v, ½ of the mean of v, or nothing; `context_mean` divides the context by N; `output_unit` scales
    each head's output to length one; `similarity` instead divides it by Σ_j (½ + q·k_j·factor/π), in the units of the context; `factor` is
    1/d for codes that stand for unit vectors; the first `prefix` tokens stand outside the convolution's raster.
    """
    batch, tokens, width = encoded.v.shape
    heads = encoded.context.shape[2]
    if weight.dim() == 2:
        weight, bias = weight.unsqueeze(0), bias.unsqueeze(0) if bias is not None else None
    _choices(local=(local, ("own", "mean", "none")), codes=(codes, ("zero-one", "plus-minus", "float")))
    if weight.shape[1:] != (width, width) or weight.dtype != encoded.v.dtype:
        raise UserError(f"weight must be (experts, {width}, {width}) of {encoded.v.dtype}, got {_about(weight)}")
    _experts(weight, bias, router, width)
    if conv is not None and (conv.dim() != 2 or conv.shape[0] != heads or conv.shape[1] % 2 == 0):
        raise UserError(f"conv must be ({heads}, odd window), got {_about(conv)}")
    if local == "mean" and encoded.v_sum.numel() == 0 and encoded.v.numel() > 0:
        raise UserError("local 'mean' needs the sums of v: call attention_encode with v_sum=True")
    if similarity and output_unit:
        raise UserError("similarity and output_unit exclude each other: pass output_unit=False")
    if similarity and encoded.k_sum.numel() == 0 and encoded.v.numel() > 0:
        raise UserError("similarity needs the sums of k: call attention_encode with k_sum=True")
    if residual is not None and residual.shape != encoded.v.shape:
        raise UserError(f"residual must be {tuple(encoded.v.shape)}, got {_about(residual)}")
    if not 0 <= prefix <= max(tokens, 0):
        raise UserError(f"prefix must be from 0 to {tokens}, got {prefix}")
    v = encoded.v if encoded.v.stride(-1) == 1 and encoded.v.stride(0) == tokens * encoded.v.stride(1) else encoded.v.contiguous()
    y, choice = torch.ops.shiftaddvit.attention_mix(
        encoded.queries, v, *encoded[2:4], encoded.k_sum, conv.contiguous() if conv is not None else None, weight.contiguous(), bias, router,
        residual.contiguous() if residual is not None else None, codes, local, context_mean,
        "similarity" if similarity else "l2" if output_unit else "none", factor, prefix, overlapping(pdl, weight, conv), backend,
    )  # fmt: skip
    return y, choice.reshape(batch, tokens) if router is not None else choice


def _parts(backend: str, x: Tensor, heads: int) -> int:
    if choose_backend(backend, x) != "triton":
        return 1
    from .triton import parts_for

    return parts_for(x.shape[0], x.shape[1], heads, x.device)


def _choices(**given: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise unknown(name, value, allowed)


def _head_width(width: int, heads: int) -> None:
    if heads < 1 or width % heads or width // heads not in (16, 32, 64, 128):
        raise UserError(f"heads must split {width} channels into heads of 16, 32, 64 or 128, got {heads}")


def _experts(weight: Tensor, bias: Tensor | None, router: Tensor | None, width: int) -> None:
    count = weight.shape[0]
    if count not in (1, 2) or (router is not None) != (count == 2) or (router is not None and router.shape not in ((2, width), (16, width))):
        raise UserError(f"two experts need a router (2, {width}) or its `route_rows` and one expert none, got {count} experts and {_about(router)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise UserError(f"bias must be {tuple(weight.shape[:2])}, got {_about(bias)}")


def _about(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


@torch.library.custom_op(
    "shiftaddvit::attention_encode",
    mutates_args=(),
    schema="(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, Tensor? router, "
    "Tensor? threshold, int heads, str rule, str codes, bool v_sum, bool k_sum, SymInt parts, bool pdl, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _encode(x, norm_weight, norm_bias, eps, weight, bias, router, threshold, heads, rule, codes, v_sum, k_sum, parts, pdl, backend):
    arguments = (x, norm_weight, norm_bias, eps, weight, bias, router, threshold, heads, rule, codes, v_sum, k_sum, parts)
    if choose_backend(backend, x) == "triton":
        from . import triton as kernels

        return kernels.encode(*arguments, pdl)
    return reference.encode(*arguments)


@_encode.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, router, threshold, heads, rule, codes, v_sum, k_sum, parts, pdl, backend):
    batch, tokens, width = x.shape
    d = width // heads
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    queries = (
        x.new_empty(batch, heads, tokens, d, dtype=weight.dtype)
        if codes == "float"
        else x.new_empty(batch, heads, tokens, -(-d // 32), dtype=torch.int32)
    )
    return (
        queries,
        x.new_empty(batch, tokens, weight.shape[1], dtype=weight.dtype)[..., weight.shape[1] - width :],
        x.new_empty(batch, parts, heads, d, d, dtype=wide),
        x.new_empty((batch, parts, heads, d) if v_sum else (0,), dtype=wide),
        x.new_empty(batch * tokens if router is not None else 0, dtype=torch.int8),
        x.new_empty((batch, parts, heads, d) if k_sum else (0,), dtype=wide),
    )


@torch.library.custom_op(
    "shiftaddvit::attention_mix",
    mutates_args=(),
    schema="(Tensor queries, Tensor v, Tensor context, Tensor v_sum, Tensor k_sum, Tensor? conv, Tensor weight, Tensor? bias, "
    "Tensor? router, Tensor? residual, str codes, str local, bool context_mean, str output, float factor, int prefix, bool pdl, "
    "str backend) "
    "-> (Tensor, Tensor)",
)
def _mix(
    queries, v, context, v_sum, k_sum, conv, weight, bias, router, residual, codes, local, context_mean, output, factor, prefix, pdl,
    backend,
):  # fmt: skip
    arguments = (
        queries, v, context, v_sum, k_sum, conv, weight, bias, router, residual, codes, local, context_mean, output, factor, prefix,
    )  # fmt: skip
    if choose_backend(backend, v) == "triton":
        from . import triton as kernels

        return kernels.mix(*arguments, pdl)
    return reference.mix(*arguments)


@_mix.register_fake
def _(
    queries, v, context, v_sum, k_sum, conv, weight, bias, router, residual, codes, local, context_mean, output, factor, prefix, pdl,
    backend,
):  # fmt: skip
    choice = v.new_empty(v.shape[0] * v.shape[1] if router is not None else 0, dtype=torch.int8)
    return v.new_empty(v.shape, dtype=(v if residual is None else residual).dtype), choice
