"""From a GNT, dense or converted by any recipe, to a `RayProgram`."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from shiftaddvit.engine.attention import LinearAttentionStep, SoftmaxAttentionStep
from shiftaddvit.engine.lower_attention import lower_angular, mixes_images
from shiftaddvit.engine.weights import (
    Preparation,
    Projection,
    joined,
    norm_of,
    projection,
)
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import BinaryConfig
from shiftaddvit.layers.moe import MoEMlp

from ..gnt import GNT
from ..gnt.ray_linear import RayAngularAttention
from ..gnt.transformer import LINEARS, GNTTransformer, RayAttention, RayBlock, ViewBlock
from .fold import fold, padded, single
from .program import Block, RayProgram
from .ray_steps import Color, FusedRay, FusedWeights, ModuleWeights, SteppedRay
from .steps import FoldedViews, FusedFeedForward, LookUp, ModuleFeedForward, ModuleViews, Query, Views

WIDTHS = (16, 32, 64, 128)
HEAD_WIDTHS = (16, 32, 64)


def why_not(model: nn.Module) -> str | None:
    """Why the engine has no form of a model; None when it has."""
    if not isinstance(model, GNT):
        return f"{type(model).__name__} has no fused form"
    if model.config.width not in WIDTHS:
        return f"the kernels take GNT of width {', '.join(map(str, WIDTHS))}, not {model.config.width}"
    if model.config.feature_channels > 64:
        return f"the kernels take up to 64 feature channels, not {model.config.feature_channels}"
    if mixes_images(model):
        return "the published threshold 'tensor' is a mean over all rays of a chunk, so the picture would depend on the chunk"
    return None


@torch.no_grad()
def lower_gnt(model: GNT, dtype: torch.dtype, device: torch.device | str | None = None) -> RayProgram:
    """The program that computes what `model` computes in evaluation mode; shares nothing with it. UserError where there is none."""
    reason = why_not(model)
    if reason is not None:
        raise UserError(f"the engine cannot render this model: {reason}; use the engine 'plain' or 'compiled'")
    prep = Preparation(dtype, torch.device(device) if device is not None else next(model.parameters()).device, uniform=True)
    net, name = model.net_coarse, "net_coarse"
    blocks = [
        Block(
            Views(
                _views(net.view_crosstrans[number], f"{name}.view_crosstrans.{number}", prep),
                _feed(net.view_crosstrans[number], f"{name}.view_crosstrans.{number}", prep),
            ),
            _query(net.q_fcs[number], f"{name}.q_fcs.{number}", prep) if number % 2 == 0 else None,
            _ray(net.view_selftrans[number], f"{name}.view_selftrans.{number}", model.samples, prep),
        )
        for number in range(len(net.view_crosstrans))
    ]
    channels = max(16, 1 << (model.config.feature_channels - 1).bit_length())
    color = Color(norm_of(net.norm, f"{name}.norm", prep), prep.vector(net.rgb_fc.weight), prep.vector(net.rgb_fc.bias))
    last = len(net.view_selftrans) - 1
    weights = _weights(net.view_selftrans[last], f"{name}.view_selftrans.{last}", prep)
    return RayProgram(_look_up(net, channels, prep), tuple(blocks), weights, color, dtype, channels, tuple(prep.notes))


def _look_up(net: GNTTransformer, channels: int, prep: Preparation) -> LookUp:
    first, second = net.rgbfeat_fc[0], net.rgbfeat_fc[2]
    color, feature = first.weight[:, :3], first.weight[:, 3:]
    width = len(first.weight)
    matrices = (padded(color, width, 4), padded(feature, width, channels))
    return LookUp(
        (
            *(prep.matrix(matrix, "net_coarse.rgbfeat_fc.0") for matrix in matrices), prep.vector(first.bias),
            prep.matrix(second.weight, "net_coarse.rgbfeat_fc.2"), prep.vector(second.bias),
        )
    )  # fmt: skip


def _views(block: ViewBlock, name: str, prep: Preparation) -> FoldedViews | ModuleViews:
    norm = norm_of(block.attn_norm, f"{name}.attn_norm", prep)
    weights = fold(block.attn, f"{name}.attn", prep)
    return FoldedViews(f"{name}.attn", norm, weights) if weights is not None else ModuleViews(f"{name}.attn", norm, _copy(block.attn, prep))


def _feed(block: ViewBlock | RayBlock, name: str, prep: Preparation) -> FusedFeedForward | ModuleFeedForward:
    norm = norm_of(block.ff_norm, f"{name}.ff_norm", prep)
    if not isinstance(block.ff, MoEMlp):
        fc1, fc2 = (projection(getattr(block.ff, part), f"{name}.ff.{part}", prep) for part in ("fc1", "fc2"))
        if fc1.fusable and fc2.fusable and fc1.weight.shape[1] % 64 == 0:
            return FusedFeedForward(f"{name}.ff", norm, fc1, fc2)
    return ModuleFeedForward(f"{name}.ff", norm, _copy(block.ff, prep))


def _query(layers: nn.Sequential, name: str, prep: Preparation) -> Query:
    first, second = layers[0], layers[2]
    width = len(first.weight)
    query, place, heading = first.weight.split([width, 63, 63], dim=1)
    return Query(
        name, prep.matrix(query, name), prep.matrix(padded(place, width, 64), name), prep.vector(heading), prep.vector(first.bias),
        prep.matrix(second.weight, name), prep.vector(second.bias),
    )  # fmt: skip


def _ray(block: RayBlock, name: str, samples: int, prep: Preparation) -> FusedRay | SteppedRay:
    norm, attention, feed = norm_of(block.attn_norm, f"{name}.attn_norm", prep), block.attn, _feed(block, name, prep)
    if isinstance(attention, RayAngularAttention):
        step = lower_angular(attention, norm, f"{name}.attn", samples, prep)
        width = norm.weight.shape[0]
        fits = isinstance(step, LinearAttentionStep) and step.local != "mean" and step.qkv.bias is None
        if not (fits and feed.fused and single(step.qkv) and single(step.proj) and step.qkv.weight.shape[1] == 3 * width):
            return SteppedRay(step, feed)
        if width // step.heads not in HEAD_WIDTHS:
            return SteppedRay(step, feed)
        return FusedRay(
            step.name, step.heads, norm, step.qkv.weight[0], step.proj.weight[0], _first(step.proj.bias), feed,
            "float" if step.codes == "float" else step.rule, -1.0 if step.codes == "plus-minus" else 0.0, step.local == "own",
            step.context_mean, step.output_unit, step.conv,
        )  # fmt: skip
    parts = [projection(getattr(attention, linear), f"{name}.attn.{linear}", prep) for linear in LINEARS]
    together, proj = joined(parts[:3]), parts[3]
    per_head = norm.weight.shape[0] // attention.heads
    if together is not None and feed.fused and single(proj) and per_head in HEAD_WIDTHS:
        return FusedRay(f"{name}.attn", attention.heads, norm, together.weight[0], proj.weight[0], _first(proj.bias), feed, "softmax")
    sources = (together,) if together is not None else tuple(parts[:3])
    return SteppedRay(SoftmaxAttentionStep(f"{name}.attn", samples, attention.heads, norm, sources, None, None, None, proj), feed)


def _first(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[0]


def _weights(block: RayBlock, name: str, prep: Preparation) -> FusedWeights | ModuleWeights:
    norm, attention = norm_of(block.attn_norm, f"{name}.attn_norm", prep), block.attn
    heads, width = attention.heads, block.attn_norm.normalized_shape[0]
    per_head = width // heads
    if not per_head & (per_head - 1):
        if isinstance(attention, RayAttention):
            q, k = (projection(getattr(attention, linear), f"{name}.attn.{linear}", prep) for linear in ("q_fc", "k_fc"))
            if single(q) and single(k):
                return FusedWeights(norm, q.weight[0], k.weight[0], heads, "softmax", 0.0)
        else:
            found = _angular_weights(attention, projection(attention.qkv, f"{name}.attn.qkv", prep))
            if found is not None:
                return FusedWeights(norm, *found[0], heads, *found[1:])
    return ModuleWeights(norm, _copy(attention, prep))


def _angular_weights(attention: RayAngularAttention, qkv: Projection) -> tuple | None:
    """((query, key), codes, low) of `ray_weights`, where it computes what the layer says."""
    codes = attention.add is None or isinstance(attention.add, BinaryConfig)
    plain = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    if not (single(qkv) and codes and plain) or attention.config.shared_qk or qkv.bias is not None:
        return None
    q, k, _ = (part.contiguous() for part in qkv.weight[0].chunk(3))
    if not attention.enabled:
        return (q, k), "softmax", 0.0
    if attention.add is None:
        return (q, k), "float", 0.0
    return (q, k), attention.add.threshold, -1.0 if attention.add.codes == "plus-minus" else 0.0


def _copy(module: nn.Module, prep: Preparation) -> nn.Module:
    return deepcopy(module).to(device=prep.device, dtype=torch.float32).eval().requires_grad_(False)
