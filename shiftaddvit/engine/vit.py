"""The order of steps in timm's plain transformers: ViT and DeiT, also distilled, with register tokens and LayerScale."""

import torch
from timm.layers import LayerScale, PatchEmbed, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .embed import EmbedStep, NormStep, lower_embed, with_class_positions
from .head import lower_head
from .lower_attention import lower_attention
from .mlp import lower_mlp
from .program import Step
from .weights import Preparation, norm_of


def lower_vit(model: VisionTransformer, image_size: tuple[int, int], prep: Preparation) -> list[Step]:
    """Patches of one size, prefix tokens in front."""
    distilled = isinstance(model, VisionTransformerDistilled)
    if model.attn_pool is not None:
        raise UserError(f"the engine cannot lower attn_pool (global_pool = {model.global_pool!r}): allowed: avg, avgmax, max, token")
    embed = _embed(model, image_size, prep)
    steps: list[Step] = [embed]
    before = norm_of(model.norm_pre, "norm_pre", prep)
    if before is not None:
        steps.append(NormStep("norm_pre", before))
    tokens = embed.grid[0] * embed.grid[1] + model.num_prefix_tokens
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        if type(block) is not Block:
            raise UserError(f"the engine cannot lower {name} ({type(block).__name__}): it takes timm's Block; run the model itself")
        first, second = _scale(block.ls1, f"{name}.ls1"), _scale(block.ls2, f"{name}.ls2")
        steps.append(lower_attention(block.attn, block.norm1, f"{name}.attn", f"{name}.norm1", embed.grid, tokens, prep, first))
        steps.append(lower_mlp(block.mlp, block.norm2, f"{name}.mlp", f"{name}.norm2", embed.grid, tokens, prep, second))
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    head = lower_head(
        model.head, "head", norm_of(model.norm, "norm", prep), "distilled" if distilled else model.global_pool, first,
        model.embed_dim, prep, norm_of(model.fc_norm, "fc_norm", prep), model.head_dist if distilled else None,
    )  # fmt: skip
    return [*steps, head]


def _embed(model: VisionTransformer, image_size: tuple[int, int], prep: Preparation) -> EmbedStep:
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise UserError(f"the engine cannot lower patch_embed ({type(embed).__name__}): it takes timm's PatchEmbed; run the model itself")
    if embed.img_size is not None and not model.dynamic_img_size and tuple(embed.img_size) != image_size:
        raise UserError(f"the model takes images of {tuple(embed.img_size)}, got image_size={image_size}; call model.set_input_size(img_size) first")
    if any(side % patch for side, patch in zip(image_size, embed.patch_size, strict=True)):
        raise UserError(f"image_size must be a multiple of the patch size {tuple(embed.patch_size)}, got {image_size}")
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [token.detach()[0] for token in tokens if token is not None]
    prefix = torch.cat(tokens) if tokens else None
    grid = tuple(side // patch for side, patch in zip(image_size, embed.patch_size, strict=True))
    return lower_embed(embed.proj, embed.norm, "patch_embed", image_size, True, prep, prefix, _positions(model, grid))


def _positions(model: VisionTransformer, grid: tuple[int, int]) -> Tensor | None:
    """One row a token, zeros for prefix tokens that have no position."""
    if model.pos_embed is None:
        return None
    position = model.pos_embed.detach()
    inside = 0 if model.no_embed_class else model.num_prefix_tokens
    if grid != tuple(model.patch_embed.grid_size):
        position = resample_abs_pos_embed(position, grid, tuple(model.patch_embed.grid_size), inside)
    return with_class_positions(position[0], model.num_prefix_tokens) if model.no_embed_class else position[0]


def _scale(module: nn.Module, name: str) -> Tensor | None:
    if isinstance(module, nn.Identity):
        return None
    if type(module) is not LayerScale:
        raise UserError(f"the engine cannot lower {name} ({type(module).__name__}): it takes LayerScale; run the model itself")
    return module.gamma.detach().float()
