"""From an attention module of a model to its step."""

from timm.layers import Attention as TimmAttention
from timm.models.pvt_v2 import Attention as PVTv2Attention
from torch import Tensor, nn

from shiftaddvit.baselines.adder_attention import AdderAttention
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.baselines.performer import PerformerAttention
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularAttention, BinaryConfig, ProjectedAttention, SoftmaxAttention
from shiftaddvit.models.pvt_v1 import Attention as PVTv1Attention

from .adder import AnyProjection, lower_projection
from .attention import HEAD_WIDTHS, AngularStep, LinearAttentionStep, PooledStep, SoftmaxAttentionStep, bare
from .embed import EmbedStep, lower_embed
from .weights import Norm, Preparation, activation_of, joined, norm_of

AttentionStep = LinearAttentionStep | AngularStep | SoftmaxAttentionStep


def lower_attention(
    module: nn.Module, norm: nn.Module, name: str, norm_name: str, grid: tuple[int, int], tokens: int, prep: Preparation, scale: Tensor | None = None
) -> AttentionStep:
    """The step of an attention module behind its norm; `scale` is LayerScale's. UserError for attention of another form."""
    before = norm_of(norm, norm_name, prep)
    if before is None:
        raise UserError(f"the engine cannot lower {name}: no LayerNorm stands before it; run the model itself")
    if type(module) in (AngularAttention, EcoformerAttention, PerformerAttention, AdderAttention):
        return lower_angular(module, before, name, tokens, prep, scale)
    if type(module) is SoftmaxAttention:
        return _plain(module, module.heads, before, name, tokens, prep, scale, None, None)
    if type(module) is TimmAttention:
        _refuse_extras(module, name)
        norms = (norm_of(module.q_norm, f"{name}.q_norm", prep), norm_of(module.k_norm, f"{name}.k_norm", prep))
        return _plain(module, module.num_heads, before, name, tokens, prep, scale, *norms)
    if type(module) in (PVTv1Attention, PVTv2Attention):
        return _reduced(module, before, name, grid, tokens, prep)
    raise UserError(
        f"the engine cannot lower {name} ({type(module).__name__}): it takes the attention of timm's ViT and PVTv2, of PVTv1, and what "
        "reparameterize makes of them; run the model itself"
    )


def _refuse_extras(module: TimmAttention, name: str) -> None:
    if module.gate is not None or not isinstance(module.norm, nn.Identity):
        extra = "a gate on its output" if module.gate is not None else "a norm before its projection"
        raise UserError(f"the engine cannot lower {name}: it has {extra}; run the model itself")


def _plain(module, heads, before: Norm, name, tokens, prep, scale, q_norm: Norm | None, k_norm: Norm | None) -> SoftmaxAttentionStep:
    inside = prep.inside(module, scale)
    qkv, proj = lower_projection(module.qkv, f"{name}.qkv", inside), lower_projection(module.proj, f"{name}.proj", inside, scale)
    return SoftmaxAttentionStep(name, tokens, heads, before, (qkv,), None, q_norm, k_norm, proj)


def _reduced(module, before: Norm, name, grid, tokens, prep) -> SoftmaxAttentionStep:
    inside = prep.inside(module)
    q, kv = (lower_projection(getattr(module, part), f"{name}.{part}", inside) for part in ("q", "kv"))
    reduction = _reduction(module, name, grid, prep)
    together = joined([q, kv]) if reduction is None else None
    sources = (together,) if together is not None else (q, kv)
    return SoftmaxAttentionStep(
        name, tokens, module.num_heads, before, sources, reduction, None, None, lower_projection(module.proj, f"{name}.proj", inside)
    )


def _reduction(module: nn.Module, name: str, grid: tuple[int, int], prep: Preparation) -> EmbedStep | PooledStep | None:
    if module.sr is None:
        return None
    pool = getattr(module, "pool", None)
    if pool is None:
        return lower_embed(module.sr, module.norm, f"{name}.sr", grid, False, prep)
    size = (pool.output_size,) * 2 if isinstance(pool.output_size, int) else tuple(pool.output_size)
    embed = lower_embed(module.sr, module.norm, f"{name}.sr", size, False, prep)
    return PooledStep(embed, grid, size, activation_of(module.act, f"{name}.act"))


def lower_angular(
    module: ProjectedAttention, before: Norm, name: str, tokens: int, prep: Preparation, scale: Tensor | None = None
) -> AngularStep | LinearAttentionStep:
    """The step of attention between two projections, linear or not, behind its norm."""
    if isinstance(module, AngularAttention) and module.hash is not None and not bool(module.hash.calibrated):
        raise UserError(f"{name}: the hash functions are not trained yet: call shiftaddvit.calibrate(model, images) before deploy")
    inside = prep.inside(module, scale)
    qkv, proj = lower_projection(module.qkv, f"{name}.qkv", inside), lower_projection(module.proj, f"{name}.proj", inside, scale)
    if not _kernels_take(module, qkv, proj):
        return AngularStep(name, tokens, before, qkv, proj, bare(module, prep.device))
    config, add = module.config, module.add
    conv = module.token_conv.weight.detach().flatten(1) if module.token_conv is not None else None  # (h, window)
    return LinearAttentionStep(
        name, tokens, module.heads, before, qkv, proj, prep.vector(conv),
        rule=add.threshold if add is not None else "token",
        codes=add.codes if add is not None else "float",
        local=config.local, context_mean=config.context == "mean", output_unit=config.output_norm == "l2",
        prefix=0 if config.prefix_in_conv else module.prefix_tokens,
    )  # fmt: skip


def _kernels_take(module: ProjectedAttention, qkv: AnyProjection, proj: AnyProjection) -> bool:
    """Whether `attention_encode` and `attention_mix` compute the same function as the module."""
    if not isinstance(module, AngularAttention):
        return False
    config, add = module.config, module.add
    codes = add is None or (isinstance(add, BinaryConfig) and add.threshold in ("token", "zero"))
    plain = isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity)
    width = module.heads * module.head_dim
    square = qkv.weight.shape[2] == width and proj.weight.shape[1:] == (width, width)
    form = config.output_norm in ("l2", "none") and not (config.unit_codes and add is not None)
    own = type(module).mix is AngularAttention.mix and type(module).encode is AngularAttention.encode
    return (
        own and module.enabled and codes and plain and form and square
        and module.head_dim in HEAD_WIDTHS and qkv.fusable and proj.fusable
    )  # fmt: skip


def mixes_images(module: nn.Module) -> bool:
    """Whether the published threshold, a mean over the whole batch, is in use somewhere inside."""
    return any(
        isinstance(part, AngularAttention) and part.enabled and isinstance(part.add, BinaryConfig) and part.add.threshold == "tensor"
        for part in module.modules()
    )
