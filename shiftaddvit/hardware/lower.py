"""From a model to the layers of its integer network: timm's PVTv2 and ViT/DeiT, dense or converted."""

import math

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.pvt_v2 import Attention as PVTv2Attention
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import Attention as ViTAttention
from timm.models.vision_transformer import Block as ViTBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularAttention, BinaryConfig, SoftmaxAttention
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import PackedShiftLinear
from shiftaddvit.layers.shift import ShiftLinear

from .layers import Layer
from .widths import Widths

Grid = tuple[int, int]

_MODELS = "timm's PVTv2 and ViT/DeiT"


def lower(model: nn.Module, image_size: Grid, widths: Widths) -> list[Layer]:
    """The layers in order; the last one's output are the logits, (B, 1, classes). UserError names a part that has no integer form."""
    if type(model) is PyramidVisionTransformerV2:
        return _Lowering(widths).pyramid(model, image_size)
    if type(model) is VisionTransformer:
        return _Lowering(widths).plain(model, image_size)
    raise UserError(f"{type(model).__name__} has no integer form yet: {_MODELS} have")


def as_tokens(images: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C)."""
    return images.flatten(2).transpose(1, 2)


class _Lowering:
    """Collects layers; methods return the name of the tensor that they add."""

    def __init__(self, widths: Widths):
        self.widths, self.layers = widths, []

    def add(self, kind: str, name: str, inputs: tuple[str, ...], primitive: str, bits: int | None, like: str | None = None, **params) -> str:
        if not name.replace(".", "").replace("_", "").isalnum() or any(layer.name == name for layer in self.layers):
            raise UserError(f"the module name {name!r} cannot name a file of the hand-off")
        self.layers.append(Layer(kind, name, inputs, primitive, bits, like, params))
        return name

    def pyramid(self, model: PyramidVisionTransformerV2, size: Grid) -> list[Layer]:
        x, grid = "image", size
        for number, stage in enumerate(model.stages):
            here = f"stages.{number}"
            embed, name = (model.patch_embed, "patch_embed") if number == 0 else (stage.downsample, f"{here}.downsample")
            x, grid = self._conv(embed.proj, f"{name}.proj", x, grid, self.widths.stream)
            x = self._norm(embed.norm, f"{name}.norm", x, self.widths.stream)
            for depth, block in enumerate(stage.blocks):
                x = self._block(block, f"{here}.blocks.{depth}", x, grid, grid[0] * grid[1])
            x = self._norm(stage.norm, f"{here}.norm", x, self.widths.stream)
        if model.global_pool != "avg":
            raise UserError(f"global_pool = {model.global_pool!r} has no integer form: 'avg' has")
        x = self.add("mean_tokens", "pool", (x,), "mult", self.widths.stream, first=0)
        self._linear(model.head, "head", x, self.widths.stream)
        return self.layers

    def plain(self, model: VisionTransformer, size: Grid) -> list[Layer]:
        embed = model.patch_embed
        if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity) or tuple(embed.img_size or size) != size:
            raise UserError(f"patch_embed has no integer form for images of {size[0]}×{size[1]}: a plain PatchEmbed of the model's own size has")
        x, grid = self._conv(embed.proj, "patch_embed.proj", "image", size, self.widths.stream)
        prefix = [t.detach()[0] for t in (getattr(model, n, None) for n in ("cls_token", "dist_token", "reg_token")) if t is not None]
        if model.pos_embed is not None:
            positions = model.pos_embed.detach()[0]
            inside = 0 if model.no_embed_class else sum(len(rows) for rows in prefix)
            if inside:
                prefix = list((torch.cat(prefix) + positions[:inside]).split([len(rows) for rows in prefix]))
            constant = positions[inside:].double()
            x = self.add("shift_add", "pos_embed", (x,), "none", self.widths.stream, coefficients=(1.0,), constant=constant)
        tokens = grid[0] * grid[1]
        if prefix:
            x = self.add("prepend", "prefix", (x,), "none", None, rows=torch.cat(prefix).double())
            tokens += self.layers[-1].params["rows"].shape[0]
        x = self._norm(model.norm_pre, "norm_pre", x, self.widths.stream)
        for number, block in enumerate(model.blocks):
            if type(block) is not ViTBlock or not all(isinstance(part, nn.Identity) for part in (block.ls1, block.ls2)):
                raise UserError(f"blocks.{number} has no integer form: timm's Block without LayerScale has")
            x = self._block(block, f"blocks.{number}", x, grid, tokens)
        x = self._norm(model.norm, "norm", x, self.widths.stream)
        if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
            raise UserError(f"global_pool = {model.global_pool!r} has no integer form: 'token' and 'avg' have")
        if model.global_pool == "token":
            x = self.add("cut", "pool", (x,), "none", None, tokens=(0, 1), channels=(0, model.embed_dim))
        else:
            first = 0 if model.pool_include_prefix else model.num_prefix_tokens
            x = self.add("mean_tokens", "pool", (x,), "mult", self.widths.stream, first=first)
        x = self._norm(model.fc_norm, "fc_norm", x, self.widths.stream)
        self._linear(model.head, "head", x, self.widths.stream)
        return self.layers

    def _block(self, block: nn.Module, name: str, x: str, grid: Grid, tokens: int) -> str:
        y = self._attention(block.attn, f"{name}.attn", self._norm(block.norm1, f"{name}.norm1", x, self.widths.activation), grid, tokens)
        x = self._sum(f"{name}.attn_residual", (x, y))
        y = self._mlp(block.mlp, f"{name}.mlp", self._norm(block.norm2, f"{name}.norm2", x, self.widths.activation), grid)
        return self._sum(f"{name}.mlp_residual", (x, y))

    def _sum(self, name: str, inputs: tuple[str, ...], bits: int | None = None) -> str:
        return self.add("shift_add", name, inputs, "add", bits or self.widths.stream, coefficients=(1.0,) * len(inputs))

    def _mlp(self, mlp: nn.Module, name: str, x: str, grid: Grid, like: str | None = None) -> str:
        if isinstance(mlp, MoEMlp) and mlp.enabled:
            self._check_gate(mlp, name)
            index = self._router(mlp, name, x)
            experts = [self._mlp(expert, f"{name}.experts.{i}", x, grid, like=name) for i, expert in enumerate(mlp.experts)]
            return self.add("select", name, (index, *experts), "none", None)
        mlp = mlp.experts[0] if isinstance(mlp, MoEMlp) else mlp
        if not isinstance(getattr(mlp, "relu", nn.Identity()), nn.Identity) or not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
            raise UserError(f"{name} has a ReLU or a norm between its linears, which has no integer form here")
        x = self._linear(mlp.fc1, f"{name}.fc1", x, self.widths.activation if hasattr(mlp, "dwconv") else self.widths.table)
        if hasattr(mlp, "dwconv"):
            x, _ = self._conv(mlp.dwconv, f"{name}.dwconv", x, grid, self.widths.table)
        if not isinstance(mlp.act, nn.GELU):
            raise UserError(f"{name}.act ({type(mlp.act).__name__}) has no integer form here: GELU has")
        tanh = mlp.act.approximate
        x = self.add("table", f"{name}.act", (x,), "none", self.widths.activation, function=lambda v: F.gelu(v, approximate=tanh))
        return self._linear(mlp.fc2, f"{name}.fc2", x, self.widths.stream, like)

    def _attention(self, attn: nn.Module, name: str, x: str, grid: Grid, tokens: int) -> str:
        if type(attn) is AngularAttention and attn.enabled:
            return self._angular(attn, name, x, tokens)
        if type(attn) is PVTv2Attention:
            q = self._linear(attn.q, f"{name}.q", x, self.widths.activation)
            if attn.pool is not None:
                raise UserError(f"{name} reduces by pooling (linear SRA), which has no integer form here")
            if attn.sr is not None:
                x, _ = self._conv(attn.sr, f"{name}.sr", x, grid, self.widths.stream)
                x = self._norm(attn.norm, f"{name}.norm", x, self.widths.activation)
                tokens = (grid[0] // attn.sr.stride[0]) * (grid[1] // attn.sr.stride[1])
            kv = self._linear(attn.kv, f"{name}.kv", x, self.widths.activation)
            k, v = (self._cut(f"{name}.{part}", kv, tokens, i, attn.dim) for i, part in enumerate("kv"))
        elif type(attn) is SoftmaxAttention or (type(attn) is ViTAttention and _plain(attn)):
            qkv = self._linear(attn.qkv, f"{name}.qkv", x, self.widths.activation)
            q, k, v = (self._cut(f"{name}.{part}", qkv, tokens, i, attn.qkv.out_features // 3) for i, part in enumerate("qkv"))
        else:
            raise UserError(
                f"{name} ({type(attn).__name__}) has no integer form here: softmax attention of {_MODELS} and linear attention with thresholded codes have"
            )
        heads = attn.heads if isinstance(attn, SoftmaxAttention) else attn.num_heads
        y = self.add("softmax_attention", f"{name}.softmax", (q, k, v), "mult", self.widths.activation, heads=heads)
        return self._linear(attn.proj, f"{name}.proj", y, self.widths.stream)

    def _angular(self, attn: AngularAttention, name: str, x: str, tokens: int) -> str:
        """o = (scale/π)·Q(KᵀV) + local, then unit length, then + token convolution of v."""
        config, add = attn.config, attn.add
        if not isinstance(add, BinaryConfig) or add.threshold == "tensor":
            raise UserError(
                f"{name} has no integer form here: of linear attention, that with codes (add = 'quant') and threshold 'token' or 'zero' has"
            )
        if not isinstance(attn.q_norm, nn.Identity) or config.output_norm == "similarity":
            what = "output_norm = 'similarity'" if config.output_norm == "similarity" else "a norm on its queries"
            raise UserError(f"{name} has {what}, which has no integer form here")
        width, heads = attn.heads * attn.head_dim, attn.heads
        wide = self._linear(attn.qkv, f"{name}.qkv", x, self.widths.stream)
        parts = (0, 0, 1) if config.shared_qk else (0, 1, 2)
        q, k, v = (self._cut(f"{name}.{part}_wide", wide, tokens, i, width) for part, i in zip("qkv", parts, strict=True))
        v = self._sum(f"{name}.v", (v,), self.widths.activation)
        q, k = (self.add("codes", f"{name}.{part}_codes", (t,), "add", 2, heads=heads, rule=add.threshold) for part, t in (("q", q), ("k", k)))
        signs = {"heads": heads, "plus_minus": add.codes == "plus-minus"}
        context = self.add("mat_add_keys", f"{name}.key_value", (k, v), "add", None, **signs)
        mixed = self.add("mat_add_queries", f"{name}.query_context", (q, context), "add", None, **signs)
        scale = 1 / (math.pi * (attn.head_dim if config.unit_codes else 1) * (tokens if config.context == "mean" else 1))
        inputs, coefficients = (mixed,), (scale,)
        if config.local == "own":
            inputs, coefficients = (mixed, v), (scale, 0.5)
        elif config.local == "mean":
            inputs, coefficients = (mixed, self.add("mean_tokens", f"{name}.v_mean", (v,), "mult", self.widths.stream, first=0)), (scale, 0.5)
        y = self.add("shift_add", f"{name}.mix", inputs, "add", self.widths.stream, coefficients=coefficients)
        if config.output_norm == "l2":
            y = self.add("unit", f"{name}.unit", (y,), "mult", self.widths.stream, heads=heads)
        if attn.token_conv is None:
            y = self._sum(f"{name}.merged", (y,), self.widths.activation)
        else:
            weight = attn.token_conv.weight.detach().double().reshape(heads, -1)
            prefix = 0 if config.prefix_in_conv else attn.prefix_tokens
            local = self.add("token_conv", f"{name}.token_conv", (v,), "mult", self.widths.stream, heads=heads, weight=weight, prefix=prefix)
            y = self._sum(f"{name}.merged", (y, local), self.widths.activation)
        return self._linear(attn.proj, f"{name}.proj", y, self.widths.stream)

    def _cut(self, name: str, x: str, tokens: int, part: int, width: int) -> str:
        return self.add("cut", name, (x,), "none", None, tokens=(0, tokens), channels=(part * width, (part + 1) * width))

    def _linear(self, module: nn.Module, name: str, x: str, bits: int, like: str | None = None) -> str:
        if isinstance(module, MoELinear) and module.enabled:
            self._check_gate(module, name)
            index = self._router(module, name, x)
            experts = [self._linear(expert, f"{name}.experts.{i}", x, bits, like or name) for i, expert in enumerate(module.experts)]
            return self.add("select", name, (index, *experts), "none", None)
        module = module.experts[0] if isinstance(module, MoELinear) else module
        if not isinstance(module, (ShiftLinear, PackedShiftLinear)) and type(module) is not nn.Linear:
            raise UserError(f"{name} ({type(module).__name__}) has no integer form here: Linear, shift layers and mixtures of them have")
        bias = module.bias.detach().double() if module.bias is not None else None
        if isinstance(module, ShiftLinear) and module.enabled or isinstance(module, PackedShiftLinear):
            packed = module if isinstance(module, PackedShiftLinear) else PackedShiftLinear.from_shift(module)
            params = {"codes": packed.integer_codes(), "code_bits": packed.bits, "offset": packed.offset, "bias": bias}
            return self.add("shift_linear", name, (x,), "shift", bits, like, **params)
        return self.add("linear", name, (x,), "mult", bits, like, weight=module.weight.detach().double(), bias=bias)

    def _router(self, mixture: nn.Module, name: str, x: str) -> str:
        return self.add("route", f"{name}.router", (x,), "mult", 8, weight=mixture.router.weight.detach().double())

    def _check_gate(self, mixture: nn.Module, name: str) -> None:
        if mixture.config.gate == "paper":
            raise UserError(
                f"{name} multiplies by its gate (gate = 'paper'), which has no integer form here: 'value-preserving' needs no multiplication"
            )

    def _conv(self, conv: nn.Conv2d, name: str, x: str, grid: Grid, bits: int) -> tuple[str, Grid]:
        if type(conv) is not nn.Conv2d:
            raise UserError(f"{name} ({type(conv).__name__}) has no integer form here: ordinary convolutions have")
        depthwise = conv.groups == conv.in_channels and conv.groups > 1
        if conv.dilation != (1, 1) or (conv.groups > 1 and not depthwise) or isinstance(conv.padding, str):
            raise UserError(f"{name} has no integer form here: full and depthwise convolutions without dilation have")
        out = tuple(
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(grid, conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        bias = conv.bias.detach().double() if conv.bias is not None else None
        geometry = {"grid": grid, "stride": conv.stride, "padding": conv.padding, "depthwise": depthwise}
        return self.add("conv", name, (x,), "mult", bits, weight=conv.weight.detach().double(), bias=bias, **geometry), out

    def _norm(self, norm: nn.Module, name: str, x: str, bits: int) -> str:
        if isinstance(norm, nn.Identity):
            return x
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or norm.weight is None:
            raise UserError(f"{name} ({type(norm).__name__}) has no integer form here: LayerNorm over channels has")
        bias = norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)
        return self.add("layer_norm", name, (x,), "mult", bits, weight=norm.weight.detach().double(), bias=bias.detach().double(), eps=norm.eps)


def _plain(attn: ViTAttention) -> bool:
    extras = (attn.q_norm, attn.k_norm, getattr(attn, "norm", nn.Identity()))
    return all(isinstance(part, nn.Identity) for part in extras) and getattr(attn, "gate", None) is None
