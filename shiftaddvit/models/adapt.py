"""The differences between a file and a model that loading bridges: image size, number of classes, distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt

import torch
from jaxtyping import Float, Shaped
from timm.layers import resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .pvt_v1 import PyramidVisionTransformer, resize_positions


@dataclass
class Adapted:
    """Weights on their way into a model; `adapt` fills it step by step."""

    weights: dict[str, Shaped[Tensor, "..."]]
    """By the model's keys."""
    made: list[tuple[str, str]] = field(default_factory=list)
    """(key in the model, how it starts)."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(key of the given weights, why the model does not have it)."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know."""


def adapt(model: nn.Module, weights: Mapping[str, Tensor], reset_head: bool) -> Adapted:
    """`weights`, already under the model's keys, for this model's image size, classes and tokens; the model is not changed.

    What it cannot bridge it leaves as it is. Raises UserError for another number of classes unless `reset_head`, and for position
    embeddings whose grid cannot be known.
    """
    state = model.state_dict()
    adapted = Adapted(dict(weights))
    undistilled = "dist_token" in weights and "dist_token" not in state and "cls_token" in state
    if undistilled:
        _leave(adapted, "dist_token", "the model is not distilled")
        adapted.notes.append("the model goes without the file's distillation token, so its outputs differ; a distilled timm model keeps it")
    for name in _classifiers(model):
        _adapt_head(adapted, name, state, reset_head)
    if isinstance(model, PyramidVisionTransformer):
        for i in range(1, 5):
            _adapt_positions(adapted, f"pos_embed{i}", state, getattr(model, f"patch_embed{i}").grid_size, int(i == 4), False, "bilinear")
    # A distilled model and a file that is not are two architectures: the comparison of keys says so.
    elif getattr(getattr(model, "patch_embed", None), "grid_size", None) is not None and "dist_token" not in state.keys() - weights.keys():
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
        _adapt_positions(adapted, "pos_embed", state, model.patch_embed.grid_size, prefix, undistilled, "bicubic")
    return adapted


def _leave(adapted: Adapted, key: str, reason: str) -> None:
    del adapted.weights[key]
    adapted.dropped.append((key, reason))


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Module names of the model's heads, as timm's configuration gives them; a DeiT file may have two where the model has one."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    names = (named,) if isinstance(named, str) else tuple(named)
    return names if "head_dist" in names else (*names, "head_dist")


def _adapt_head(adapted: Adapted, name: str, state: Mapping[str, Tensor], reset_head: bool) -> None:
    weight, bias = f"{name}.weight", f"{name}.bias"
    given, wanted = adapted.weights.get(weight), state.get(weight)
    if wanted is None:
        for key in (weight, bias):
            if key in adapted.weights:
                _leave(adapted, key, "the model is not distilled" if name == "head_dist" else "the model has no head")
        return
    # A second head that the file lacks is another architecture, not another number of classes.
    if given is None and name == "head_dist":
        return
    if given is not None and (given.shape == wanted.shape or given.shape[1:] != wanted.shape[1:]):
        return
    classes = "no head" if given is None else f"{given.shape[0]} classes"
    if not reset_head:
        raise UserError(f"the file has {classes}, the model {wanted.shape[0]}; num_classes_mismatch='reset' starts the model's head anew")
    for key in (weight, bias):
        if key in adapted.weights:
            _leave(adapted, key, f"{classes}, the model has {wanted.shape[0]}")
    # timm may start heads with zeros; these values are ordinary ones from which training starts.
    adapted.weights[weight] = trunc_normal_(torch.empty_like(wanted, device="cpu"), std=0.02)
    adapted.made.append((weight, f"normal, standard deviation 0.02 ({wanted.shape[0]} classes, the file has {classes})"))
    if bias in state:
        adapted.weights[bias] = torch.zeros_like(state[bias], device="cpu")
        adapted.made.append((bias, "zeros"))


def _adapt_positions(
    adapted: Adapted, key: str, state: Mapping[str, Tensor], grid: tuple[int, int], prefix: int, undistilled: bool, mode: str
) -> None:
    position: Float[Tensor, "1 P C"] | None = adapted.weights.get(key)
    wanted = state.get(key)
    if position is None or wanted is None or position.dim() != 3 or position.shape[-1] != wanted.shape[-1]:
        return
    changes = []
    if undistilled and prefix == 1:
        position = torch.cat([position[:, :1], position[:, 2:]], dim=1)
        changes.append("without the distillation token's row")
    count = position.shape[1] - prefix
    if position.shape == wanted.shape:
        if grid[0] != grid[1]:
            adapted.notes.append(f"{key}: the file's {count} positions are taken as {grid[0]}×{grid[1]}, as in the model")
    else:
        side = isqrt(max(count, 0))
        if side * side != count or side == 0:
            raise UserError(
                f"{key} has {position.shape[1]} rows, of which {prefix} for tokens without a place: "
                "the rest is no square grid, so it cannot be resampled"
            )
        changes.append(f"{mode}, from {side}×{side} to {grid[0]}×{grid[1]}")
        if mode == "bilinear":
            position = resize_positions(position.float(), (side, side), grid, prefix)
        else:
            position = resample_abs_pos_embed(position.float(), list(grid), [side, side], prefix, interpolation=mode)
    if changes:
        adapted.made.append((key, ", ".join(changes)))
    adapted.weights[key] = position
