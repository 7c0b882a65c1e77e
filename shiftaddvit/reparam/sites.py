"""Where attention and MLP linears live in each family of models: the only place that knows. A new family is one new entry here."""

from dataclasses import dataclass
from typing import Literal

from timm.models.vision_transformer import Attention
from torch import nn

from shiftaddvit.errors import UserError


@dataclass(frozen=True)
class AttentionSite:
    """An attention module of the dense model."""

    name: str
    """Module name in the model."""
    module: nn.Module
    """The module itself."""
    kind: Literal["sra", "qkv", "linears-only"]
    """`sra`: q, kv, proj and perhaps a spatial reduction · `qkv`: one fused linear and proj · else only its linears can be swapped."""
    linears: tuple[str, ...]
    """Names of its linear layers, relative to the module."""
    prefix_tokens: int = 0
    """Class and distillation tokens at the front of the sequence."""
    last_stage: bool = False
    """In the last stage of a pyramid, where the method keeps softmax attention."""
    obstacle: str = ""
    """Why its attention cannot become linear; empty when it can."""


@dataclass(frozen=True)
class MlpSite:
    """An MLP of the dense model, with linears fc1 and fc2."""

    name: str
    """Module name in the model."""
    module: nn.Module
    """The module itself."""
    mixes_tokens: bool
    """Whether something between the linears (a depthwise convolution) looks at other tokens."""
    linears: tuple[str, ...] = ("fc1", "fc2")
    """Names of its linear layers, relative to the module."""


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[MlpSite]]:
    """Every attention and MLP of `model`, in the order of its modules. UserError for a model that has none."""
    attentions, mlps = [], []
    last = _last_stage_prefix(model)
    prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
    has_class_token = getattr(model, "cls_token", None) is not None
    for name, module in model.named_modules():
        if _is_attention(module):
            attentions.append(_attention_site(name, module, prefix_tokens, last, has_class_token))
        elif isinstance(getattr(module, "fc1", None), nn.Linear) and isinstance(getattr(module, "fc2", None), nn.Linear):
            mixes = any(isinstance(child, nn.Conv2d) for child in module.modules())
            mlps.append(MlpSite(name, module, mixes))
    if not attentions and not mlps:
        raise UserError(
            f"no attention or MLP found in {type(model).__name__}: it is not a vision transformer in timm's layout "
            "(attention with qkv or q/kv and proj, MLP with fc1 and fc2); a new family is one entry in reparam/sites.py"
        )
    return attentions, mlps


def _is_attention(module: nn.Module) -> bool:
    has_proj = isinstance(getattr(module, "proj", None), nn.Linear)
    fused = isinstance(getattr(module, "qkv", None), nn.Linear)
    split = isinstance(getattr(module, "q", None), nn.Linear) and isinstance(getattr(module, "kv", None), nn.Linear)
    return has_proj and (fused or split)


def _attention_site(
    name: str, module: nn.Module, prefix_tokens: int, last: str | None, has_class_token: bool
) -> AttentionSite:
    in_last = last is not None and name.startswith(last)
    if isinstance(getattr(module, "kv", None), nn.Linear):
        obstacle = "" if hasattr(module, "sr") else "its queries and keys are not of one sequence"
        # PVTv1 has its class token in the last stage only; other pyramids have none.
        return AttentionSite(name, module, "sra", ("q", "kv", "proj"), int(in_last and has_class_token), in_last, obstacle)
    obstacle = _qkv_obstacle(module)
    kind = "linears-only" if obstacle else "qkv"
    # With biases of its own such a module uses the weight of qkv directly, which then must stay a weight.
    linears = ("proj",) if getattr(module, "q_bias", None) is not None else ("qkv", "proj")
    return AttentionSite(name, module, kind, linears, prefix_tokens, in_last, obstacle)


def _qkv_obstacle(module: nn.Module) -> str:
    if getattr(module, "rope", None) is not None or "Rope" in type(module).__name__ or type(module).__name__ == "EvaAttention":
        return "rotary position embeddings"
    if getattr(module, "relative_position_bias_table", None) is not None or getattr(module, "rel_pos", None) is not None:
        return "a relative position bias on the scores"
    if getattr(module, "gate", None) is not None:
        return "a gate on its output"
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return "a norm between its heads and its projection"
    if getattr(module, "q_bias", None) is not None:
        return "biases of queries and values beside its linear"
    if not isinstance(module, Attention):
        return f"the unknown form {type(module).__module__}.{type(module).__name__}"
    return ""


def _last_stage_prefix(model: nn.Module) -> str | None:
    """The name prefix of a pyramid's last stage; None for a plain transformer."""
    if isinstance(getattr(model, "stages", None), (nn.ModuleList, nn.Sequential)):
        return f"stages.{len(model.stages) - 1}."
    if hasattr(model, "block4") and not hasattr(model, "block5"):
        return "block4."
    return None
