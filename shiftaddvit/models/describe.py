"""Saying in words what network some weights belong to, from their keys and shapes."""

import re
from collections.abc import Mapping

from jaxtyping import Shaped
from torch import Tensor

_SIZES = {
    ("PVTv1", (2, 2, 2, 2), (64, 128, 320, 512)): "pvt_tiny",
    ("PVTv1", (3, 4, 6, 3), (64, 128, 320, 512)): "pvt_small",
    ("PVTv1", (3, 4, 18, 3), (64, 128, 320, 512)): "pvt_medium",
    ("PVTv1", (3, 8, 27, 3), (64, 128, 320, 512)): "pvt_large",
    ("PVTv2", (2, 2, 2, 2), (32, 64, 160, 256)): "pvt_v2_b0",
    ("PVTv2", (2, 2, 2, 2), (64, 128, 320, 512)): "pvt_v2_b1",
    ("PVTv2", (3, 4, 6, 3), (64, 128, 320, 512)): "pvt_v2_b2",
    ("PVTv2", (3, 4, 18, 3), (64, 128, 320, 512)): "pvt_v2_b3",
    ("PVTv2", (3, 8, 27, 3), (64, 128, 320, 512)): "pvt_v2_b4",
    ("PVTv2", (3, 6, 40, 3), (64, 128, 320, 512)): "pvt_v2_b5",
}


def describe(weights: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Family, size and widths of the network with these weights (timm's keys, or PVTv1's)."""
    if "pos_embed1" in weights:
        return _pyramid("PVTv1", weights, r"block(\d+)\.(\d+)\.", "block%d.0.norm1.weight", 1)
    if "stages.0.blocks.0.attn.kv.weight" in weights:
        return _pyramid("PVTv2", weights, r"stages\.(\d+)\.blocks\.(\d+)\.", "stages.%d.blocks.0.norm1.weight", 0)
    if "blocks.0.attn.qkv.weight" in weights:
        depth = 1 + max(int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key)))
        patch = weights["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in weights else "?"
        distilled = ", distilled" if "dist_token" in weights else ""
        return f"ViT with {depth} blocks, width {weights['blocks.0.attn.qkv.weight'].shape[1]}, patch {patch}{distilled}"
    return f"a network of {len(weights)} tensors"


def _pyramid(family: str, weights: Mapping[str, Tensor], block: str, norm: str, first: int) -> str:
    found = {(int(match[1]), int(match[2])) for key in weights if (match := re.match(block, key))}
    stages = sorted({stage for stage, _ in found})
    depths = tuple(sum(1 for stage, _ in found if stage == one) for one in stages)
    widths = tuple(weights[norm % one].shape[0] for one in stages if norm % one in weights)
    name = _SIZES.get((family, depths, widths), family)
    if name == "pvt_v2_b2" and "stages.3.blocks.0.attn.sr.weight" in weights:
        name = "pvt_v2_b2_li"
    return f"{name} (depths {'-'.join(map(str, depths))}, widths {'-'.join(map(str, widths))})"
