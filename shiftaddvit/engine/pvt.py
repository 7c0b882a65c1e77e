"""The order of steps in the pyramids: PVTv2 (timm) and PVTv1 (ours)."""

from timm.models.pvt_v2 import Block as PVTv2Block
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import nn

from shiftaddvit.errors import UserError
from shiftaddvit.models.pvt_v1 import Block as PVTv1Block
from shiftaddvit.models.pvt_v1 import PyramidVisionTransformer, resize_positions

from .embed import NormStep, lower_embed
from .head import lower_head
from .lower_attention import lower_attention
from .mlp import lower_mlp
from .program import Step
from .weights import Preparation, norm_of


def lower_pvt_v2(model: PyramidVisionTransformerV2, image_size: tuple[int, int], prep: Preparation) -> list[Step]:
    """Four stages of tokens without class token; every stage closes with a norm."""
    embed = lower_embed(model.patch_embed.proj, model.patch_embed.norm, "patch_embed", image_size, True, prep)
    steps: list[Step] = [embed]
    for number, stage in enumerate(model.stages):
        name = f"stages.{number}"
        if stage.downsample is not None:
            embed = lower_embed(stage.downsample.proj, stage.downsample.norm, f"{name}.downsample", embed.grid, False, prep)
            steps.append(embed)
        steps += _blocks(stage.blocks, PVTv2Block, f"{name}.blocks", embed.grid, 0, prep)
        norm = norm_of(stage.norm, f"{name}.norm", prep)
        if number + 1 < len(model.stages):
            steps.append(NormStep(f"{name}.norm", norm))
    return [*steps, lower_head(model.head, "head", norm, model.global_pool, 0, model.num_features, prep)]


def lower_pvt_v1(model: PyramidVisionTransformer, image_size: tuple[int, int], prep: Preparation) -> list[Step]:
    """Four stages with position embeddings; the last one has a class token in front."""
    steps: list[Step] = []
    size = image_size
    for number in range(1, 5):
        embed, position = getattr(model, f"patch_embed{number}"), getattr(model, f"pos_embed{number}").detach()
        last = number == 4
        grid = tuple(side // patch for side, patch in zip(size, embed.patch_size, strict=True))
        if min(grid) < model.sr_ratios[number - 1]:
            raise UserError(f"image_size {image_size} is too small: stage {number} has a {grid[0]}×{grid[1]} grid; use 32 pixels a side or more")
        steps.append(
            lower_embed(
                embed.proj, embed.norm, f"patch_embed{number}", size, number == 1, prep,
                prefix=model.cls_token[0] if last else None, position=resize_positions(position, embed.grid_size, grid, int(last))[0],
            )
        )  # fmt: skip
        steps += _blocks(getattr(model, f"block{number}"), PVTv1Block, f"block{number}", grid, int(last), prep)
        size = grid
    return [*steps, lower_head(model.head, "head", norm_of(model.norm, "norm", prep), model.global_pool, 1, model.num_features, prep)]


def _blocks(blocks: nn.ModuleList, kind: type, name: str, grid: tuple[int, int], prefix: int, prep: Preparation) -> list[Step]:
    steps: list[Step] = []
    tokens = grid[0] * grid[1] + prefix
    for number, block in enumerate(blocks):
        here = f"{name}.{number}"
        if type(block) is not kind:
            raise UserError(f"the engine cannot lower {here} ({type(block).__name__}): it takes {kind.__name__}; run the model itself")
        steps.append(lower_attention(block.attn, block.norm1, f"{here}.attn", f"{here}.norm1", grid, tokens, prep))
        steps.append(lower_mlp(block.mlp, block.norm2, f"{here}.mlp", f"{here}.norm2", grid, tokens, prep))
    return steps
