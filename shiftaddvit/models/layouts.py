"""The layouts that published weights come in: how to tell them apart, and how to rename their keys."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from shiftaddvit.errors import UserError

from .layout_rules import DINO2_HF, PVT1_HF, PVT2_HF, PVT2_OFFICIAL, VIT_HF, VIT_HF5, Rules

Family = Literal["PVTv2", "PVTv1", "ViT"]


@dataclass(frozen=True)
class Layout:
    """One way of naming the weights of one family of models."""

    name: str
    """What reports call it."""
    family: Family | None
    """The models it is for; None for keys that are the model's own."""
    signature: tuple[str, ...] = ()
    """Keys that tell it from the others, without prefix; all must be there."""
    prefixes: tuple[str, ...] = ()
    """What may stand in front of every key but the classifier's."""
    rules: Rules | None = None
    """(template of a key, template of its target); None leaves keys as they are."""
    leaves: Rules = ()
    """(template of a key, why it is left out)."""
    norm_eps: float | None = None
    """Default LayerNorm epsilon of the library whose layout this is, where it may differ from the model's."""


@dataclass(frozen=True)
class Renamed:
    """Weights under the target's keys."""

    weights: dict[str, Shaped[Tensor, "..."]]
    """Tensor by target key, blocks of rows joined."""
    sources: dict[str, Rules]
    """Target key → (key in the file, target key with its rows where several share one)."""
    dropped: Rules
    """(key in the file, why it has no target)."""
    unknown: tuple[str, ...]
    """Keys that the layout does not have."""


_MASK = "only masked pre-training uses it"
_HF_LEAVES = (("pooler.dense.*", "timm's models have no pooler"), ("embeddings.mask_token", _MASK))
_DINO2_LEAVES = (*_HF_LEAVES, ("classifier.*", "it sees the class token beside the mean of the patches, timm's head only one of them"))
_VIT_PREFIXES = ("vit.", "deit.")

LAYOUTS = (
    Layout("Hugging Face PVTv2", "PVTv2", ("encoder.layers.0.patch_embedding.proj.weight",), ("pvt_v2.",), PVT2_HF, (), 1e-6),
    Layout("Hugging Face PVTv1", "PVTv1", ("encoder.patch_embeddings.0.projection.weight",), ("pvt.",), PVT1_HF, (), 1e-6),
    Layout("Hugging Face DINOv2", "ViT", ("encoder.layer.0.layer_scale1.lambda1",), ("dinov2.", "backbone."), DINO2_HF, _DINO2_LEAVES, 1e-6),
    Layout("Hugging Face ViT/DeiT", "ViT", ("encoder.layer.0.layernorm_before.weight",), _VIT_PREFIXES, VIT_HF, _HF_LEAVES, 1e-12),
    Layout("Hugging Face ViT/DeiT, version 5", "ViT", ("layers.0.layernorm_before.weight",), _VIT_PREFIXES, VIT_HF5, _HF_LEAVES, 1e-12),
    Layout("official PVTv1", "PVTv1", ("pos_embed1", "block1.0.attn.kv.weight")),
    Layout("official PVTv2", "PVTv2", ("patch_embed1.proj.weight", "block1.0.mlp.dwconv.dwconv.weight"), (), PVT2_OFFICIAL),
    Layout("timm PVTv2", "PVTv2", ("stages.0.blocks.0.attn.kv.weight", "stages.0.blocks.0.mlp.dwconv.weight")),
    Layout("timm ViT/DeiT (and official DeiT)", "ViT", ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"), leaves=(("mask_token", _MASK),)),
)


def find_layout(keys: Collection[str]) -> Layout | None:
    """The first layout whose signature is among `keys`; None when no layout fits."""
    for layout in LAYOUTS:
        if any(all(prefix + key in keys for key in layout.signature) for prefix in ("", *layout.prefixes)):
            return layout
    return None


def rename(layout: Layout, weights: Mapping[str, Tensor]) -> Renamed:
    """`weights` under the keys of timm, or of our PVTv1. Raises UserError where one of query, key and value is missing."""
    parts: dict[str, dict[str, str]] = {}
    dropped, unknown = [], []
    for key in weights:
        bare = next((key.removeprefix(p) for p in layout.prefixes if key.startswith(p)), key)
        reason = _apply(layout.leaves, bare)
        target = bare if layout.rules is None else _apply(layout.rules, bare)
        if reason is not None:
            dropped.append((key, reason))
        elif target is None:
            unknown.append(key)
        else:
            name, _, part = target.partition("@") if layout.rules is not None else (target, "", "")
            twin = parts.setdefault(name, {}).setdefault(part, key)
            if twin != key:
                raise UserError(f"{twin} and {key} are both {name}")
    joined, sources = {}, {}
    for target, keys in parts.items():
        joined[target], sources[target] = _join(target, keys, weights)
    return Renamed(joined, sources, tuple(dropped), tuple(unknown))


def _join(target: str, keys: Mapping[str, str], weights: Mapping[str, Tensor]) -> tuple[Tensor, Rules]:
    """The tensor of `target` from its blocks of rows; `keys` maps each block, "0/3", to its key in the file, and "" to a whole one."""
    if list(keys) == [""]:
        return weights[keys[""]], ((keys[""], target),)
    count = int(next(iter(keys)).partition("/")[2])
    wanted = [f"{i}/{count}" for i in range(count)]
    missing = [part for part in wanted if part not in keys]
    if missing:
        raise UserError(f"{target} is made of {count} tensors and the file has {', '.join(keys.values())} only")
    blocks = [weights[keys[part]] for part in wanted]
    if len({tuple(block.shape) for block in blocks}) > 1:
        raise UserError(f"{target} is made of {', '.join(keys[part] for part in wanted)}, whose shapes differ")
    rows = blocks[0].shape[0]
    return torch.cat(blocks), tuple((keys[part], f"{target}[{i * rows}:{(i + 1) * rows}]") for i, part in enumerate(wanted))


def _apply(rules: Rules, key: str) -> str | None:
    """The target of the first rule that fits `key`."""
    for source, target in rules:
        match = _pattern(source).fullmatch(key)
        if match:
            values = iter(match.groups())
            return re.sub(r"[#*]", lambda _: next(values), target)
    return None


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias)"))
