"""Pyramid Vision Transformer, first version (Wang et al., ICCV 2021), with the key names of its published weights.

timm has the second version only; `pvt_v1_variants` registers this one beside it.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftaddvit.errors import UserError

BlockNorm = partial(nn.LayerNorm, eps=1e-6)
"""Norm of the blocks and of the head. Patch embeddings and spatial reduction keep torch's 1e-5, as in the published code."""


class Attention(nn.Module):
    """Multi-head softmax attention whose keys and values come from a grid `sr_ratio` times smaller (spatial-reduction attention)."""

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ):
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.sr_ratio = dim, num_heads, dim // num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "B N C"], feat_size: Sequence[int]) -> Float[Tensor, "B N C"]:
        batch, tokens, dim = x.shape
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        if self.sr is not None:
            grid = x.transpose(1, 2).reshape(batch, dim, *feat_size)
            x = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        k, v = self.kv(x).reshape(batch, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, M, d)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, tokens, dim)))


class Block(nn.Module):
    """Attention, then MLP, each with a norm before and a shortcut around."""

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float, qkv_bias: bool, attn_drop: float, proj_drop: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = BlockNorm(dim)
        self.attn = Attention(dim, num_heads, sr_ratio, qkv_bias, attn_drop, proj_drop)
        self.norm2 = BlockNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B N C"], feat_size: Sequence[int]) -> Float[Tensor, "B N C"]:
        x = x + self.drop_path(self.attn(self.norm1(x), feat_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches side by side to tokens; `grid_size` is the grid that the model's position embedding is made for."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B I H W"]) -> tuple[Float[Tensor, "B N C"], tuple[int, int]]:
        grid = self.proj(x)
        return self.norm(grid.flatten(2).transpose(1, 2)), (grid.shape[2], grid.shape[3])


class PyramidVisionTransformer(nn.Module):
    """Four stages of transformer blocks on grids of 1/4, 1/8, 1/16 and 1/32 of the image; a class token in the last one.

    Other image sizes than `img_size` are taken too: position embeddings are interpolated (bilinear) in the forward. Every stage's grid
    must be at least its spatial reduction: 32 pixels a side for the published ones. Raises UserError for a smaller image. A grid that
    is no multiple of its reduction gives no keys for its last rows and columns, as in the published code.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        _check_pool(global_pool)
        if not len(embed_dims) == len(depths) == len(num_heads) == len(mlp_ratios) == len(sr_ratios) == 4:
            raise UserError("embed_dims, depths, num_heads, mlp_ratios and sr_ratios must have 4 values each, one a stage")
        if sr_ratios[-1] != 1:
            raise UserError(f"sr_ratios must end with 1 (the class token has no place in the last stage's grid), got {sr_ratios[-1]}")
        odd = [(dim, heads) for dim, heads in zip(embed_dims, num_heads, strict=True) if dim % heads]
        if odd:
            raise UserError(f"embed_dims must be multiples of num_heads, got {odd[0][0]} for {odd[0][1]} heads")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.depths, self.sr_ratios, self.num_stages = tuple(depths), tuple(sr_ratios), 4
        self.grad_checkpointing = False
        self.feature_info = []
        patch = to_2tuple(patch_size)
        size, side, chans = to_2tuple(img_size), patch, in_chans
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        for i, dim in enumerate(embed_dims):
            embed = PatchEmbed(size, side, chans, dim)
            _check_grid(embed.grid_size, sr_ratios[i], i + 1, f"img_size {to_2tuple(img_size)}")
            blocks = [
                Block(dim, num_heads[i], sr_ratios[i], mlp_ratios[i], qkv_bias, attn_drop_rate, proj_drop_rate, rate)
                for rate in rates[sum(depths[:i]) : sum(depths[: i + 1])]
            ]
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, embed.num_patches + (i == 3), dim)))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            self.feature_info.append({"num_chs": dim, "reduction": patch[0] * 2**i, "module": f"block{i + 1}"})
            size, side, chans = embed.grid_size, (2, 2), dim
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.norm = BlockNorm(self.embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        for i in range(1, 5):
            trunc_normal_(getattr(self, f"pos_embed{i}"), std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def patch_embed(self) -> PatchEmbed:
        """The first stage's, which knows the image and patch size, under timm's name."""
        return self.patch_embed1

    def no_weight_decay(self) -> set[str]:
        """The class token, as in the published code, which does decay the position embeddings."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates (timm): stem, then stages or blocks, then the rest."""
        fine = [(r"^block(\d)\.(\d+)", None), (r"^(?:patch_embed|pos_embed)(\d)", (0,)), (r"^(?:cls_token|norm)", (99999,))]
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": r"^(?:block|patch_embed|pos_embed)(\d)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with random weights; none for 0 classes."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        weight = self.cls_token
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if num_classes > 0:
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def _stage(self, x: Float[Tensor, "B I H W"], i: int) -> tuple[Float[Tensor, "B N C"], tuple[int, int]]:
        """Tokens after stage i (1 to 4) and their grid; the last stage's have the class token in front."""
        embed, position = getattr(self, f"patch_embed{i}"), getattr(self, f"pos_embed{i}")
        image = tuple(x.shape[2:])
        x, grid = embed(x) if image[0] >= embed.patch_size[0] and image[1] >= embed.patch_size[1] else (x, (0, 0))
        _check_grid(grid, self.sr_ratios[i - 1], i, f"an input of {image} to its patch embedding")
        if i == 4:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + resize_positions(position, embed.grid_size, grid, int(i == 4)))
        for block in getattr(self, f"block{i}"):
            x = checkpoint(block, x, grid, use_reentrant=False) if self.grad_checkpointing and self.training else block(x, grid)
        return x, grid

    def forward_features(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B N C"]:
        """Normalised tokens of the last stage, class token first."""
        for i in range(1, 4):
            x = _to_map(*self._stage(x, i))
        return self.norm(self._stage(x, 4)[0])

    def forward_head(self, x: Float[Tensor, "B N C"], pre_logits: bool = False) -> Float[Tensor, "B K"]:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B K"]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "B I H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps (B, C, H, W) after the stages in `indices` (timm's interface); `norm` applies the final norm to the last one."""
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take = _stage_indices(indices)
        last = max(take)
        maps = []
        for i in range(last + 1 if stop_early or intermediates_only else 4):
            tokens, grid = self._stage(x, i + 1)
            if i == 3:
                normed = self.norm(tokens)
                x = _to_map((normed if norm else tokens)[:, 1:], grid)
            else:
                x = _to_map(tokens, grid)
            if i in take:
                maps.append(x)
        if intermediates_only:
            return maps
        return (normed if i == 3 else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Stages to take features from; the head goes, the stages stay (timm's interface)."""
        take = _stage_indices(indices)
        if prune_head:
            self.reset_classifier(0, "")
        return take


def resize_positions(
    position: Float[Tensor, "1 P C"], old: tuple[int, int], new: tuple[int, int], prefix: int
) -> Float[Tensor, "1 Q C"]:
    """Position embeddings for another grid: bilinear, the first `prefix` rows kept, as the published code does."""
    if tuple(old) == tuple(new):
        return position
    front, grid = position[:, :prefix], position[:, prefix:]
    grid = F.interpolate(grid.reshape(1, *old, -1).permute(0, 3, 1, 2), size=tuple(new), mode="bilinear", align_corners=False)
    return torch.cat([front, grid.flatten(2).transpose(1, 2)], dim=1)


def _to_map(tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid).contiguous()


def _stage_indices(indices: int | Sequence[int] | None) -> list[int]:
    """Stages from 0: all, the last n, or those listed (negative from the end)."""
    listed = range(-(4 if indices is None else indices), 0) if indices is None or isinstance(indices, int) else indices
    take = [index + 4 if index < 0 else index for index in listed]
    if not take or not all(0 <= index < 4 for index in take):
        raise UserError(f"feature indices must be 1 to 4 last stages or a list of stages from 0 to 3, got {indices}")
    return take


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("token", "avg", ""):
        raise UserError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")


def _check_grid(grid: tuple[int, int], sr_ratio: int, stage: int, what: str) -> None:
    if min(grid) < sr_ratio:
        raise UserError(
            f"{what} is too small: stage {stage} has a {grid[0]}×{grid[1]} grid and reduces it {sr_ratio} times; "
            "use a larger image (32 pixels a side or more with the published sr_ratios)"
        )
