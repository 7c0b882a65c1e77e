"""Where attention, MLPs and all other layers live in each family of models: the only place that knows. A new family is one new entry here,
or, for models of this package that the core may not import, a method `attention_site(name) -> AttentionSite` of its attention modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from timm.models import FeatureDictNet, pvt_v2, twins, vision_transformer
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularAttention
from shiftaddvit.models import pvt_v1


@dataclass(frozen=True)
class AttentionSite:
    """An attention module of the dense model."""

    name: str
    """Module name in the model."""
    module: nn.Module
    """The module itself."""
    kind: Literal["sra", "qkv", "split", "linears-only"]
    """`sra`: q, kv, proj and perhaps a spatial reduction · `qkv`: one fused linear and proj · `split`: four linears for q, k, v and out ·
    else only its linears can be swapped."""
    linears: tuple[str, ...]
    """Names of its linear layers, relative to the module; of kind `split` in the order q, k, v, out."""
    prefix_tokens: int = 0
    """Class and distillation tokens at the front of the sequence."""
    last_stage: bool = False
    """In the last stage of a pyramid, where the method keeps softmax attention."""
    obstacle: str = ""
    """Why its attention cannot become linear; empty when it can."""
    subtracts: bool = False
    """Its attention multiplies no queries with keys, so every recipe leaves it and rules its linears alone."""
    linear_form: Callable[..., nn.Module] = AngularAttention
    """What its linear form is made with; the arguments of `AngularAttention`."""


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


@dataclass(frozen=True)
class RestSite:
    """A linear layer or convolution that belongs to neither attention nor MLP linears."""

    name: str
    """Module name in the model."""
    module: nn.Module
    """The module itself."""
    end: bool
    """Whether it sees the pixels or makes the logits."""


def find_rest(model: nn.Module, attentions: list[AttentionSite], mlps: list[MlpSite]) -> list[RestSite]:
    """Every linear layer and convolution that the sites do not name, in the order of the model's modules. Parts of an attention whose
    weight is used directly, rather than called, are none of them."""
    taken = {f"{site.name}.{linear}" for site in (*attentions, *mlps) for linear in site.linears}
    inside = tuple(f"{site.name}." for site in attentions)
    heads = set(map(id, _classifiers(model)))
    found: list[RestSite] = []
    for name, module in model.named_modules():
        called = isinstance(module, nn.Conv2d) or (type(module) is nn.Linear and not name.startswith(inside))
        if called and name not in taken:
            found.append(RestSite(name, module, not found or id(module) in heads))
    return found


def _classifiers(model: nn.Module) -> list[nn.Module]:
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    return list(heads) if isinstance(heads, (tuple, list)) else [heads]


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[MlpSite]]:
    """Every attention and MLP of `model`, in the order of its modules. UserError for a model that has none."""
    attentions, mlps = [], []
    for name, module in model.named_modules():
        if hasattr(module, "attention_site"):
            attentions.append(module.attention_site(name))
        elif _is_attention(module):
            attentions.append(_attention_site(name, module, *_network_around(model, name)))
        elif _is_linear(getattr(module, "fc1", None)) and _is_linear(getattr(module, "fc2", None)):
            mixes = any(isinstance(child, nn.Conv2d) for child in module.modules())
            mlps.append(MlpSite(name, module, mixes))
    if not attentions and not mlps:
        raise UserError(
            f"no attention or MLP found in {type(model).__name__}: it is not a vision transformer in timm's layout "
            "(attention with qkv or q/kv and proj, MLP with fc1 and fc2); a new family is one entry in reparam/sites.py"
        )
    return attentions, mlps


def _is_linear(module: object) -> bool:
    """A linear layer as torch computes it; a subclass with a forward of its own is something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_attention(module: nn.Module) -> bool:
    fused = _is_linear(getattr(module, "qkv", None))
    split = _is_linear(getattr(module, "q", None)) and _is_linear(getattr(module, "kv", None))
    return _is_linear(getattr(module, "proj", None)) and (fused or split)


def _network_around(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The network that a module belongs to and the prefix of its names: the nearest one around it that has stages or tokens of its own,
    as inside a detector or one of timm's feature extractors; else the whole model."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:end])
        network = model.get_submodule(around)
        if hasattr(network, "num_prefix_tokens") or last_stage(network) is not None:
            return f"{around}.", network
    return "", model


def _attention_site(name: str, module: nn.Module, prefix: str, network: nn.Module) -> AttentionSite:
    last = last_stage(network)
    in_last = last is not None and name.startswith(prefix + last)
    tokens = _prefix_tokens(network)
    if isinstance(getattr(module, "kv", None), nn.Linear):
        # PVTv1 has its class token in the last stage only; other pyramids have none.
        return AttentionSite(name, module, "sra", ("q", "kv", "proj"), tokens if in_last else 0, in_last, _sra_obstacle(module))
    obstacle = _qkv_obstacle(module)
    kind = "linears-only" if obstacle else "qkv"
    # With biases of its own such a module uses the weight of qkv directly, which then must stay a weight.
    linears = ("proj",) if getattr(module, "q_bias", None) is not None else ("qkv", "proj")
    return AttentionSite(name, module, kind, linears, tokens, in_last, obstacle)


def _prefix_tokens(network: nn.Module) -> int:
    """Tokens in front of the patches."""
    if hasattr(network, "num_prefix_tokens"):
        return int(network.num_prefix_tokens)
    tokens = (getattr(network, name, None) for name in ("cls_token", "dist_token"))
    return sum(token.shape[1] for token in tokens if isinstance(token, Tensor) and token.ndim == 3)


_SRA_FORWARDS = tuple(one.forward for one in (pvt_v1.Attention, pvt_v2.Attention, twins.GlobalSubSampleAttn))
"""What attention with spatial reduction is known to compute."""


def _sra_obstacle(module: nn.Module) -> str:
    if not hasattr(module, "sr"):
        return "its queries and keys are not of one sequence"
    return "" if type(module).forward in _SRA_FORWARDS else _unknown_form(module)


def _unknown_form(module: nn.Module) -> str:
    return f"the unknown form {type(module).__module__}.{type(module).__qualname__}"


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
    if type(module).forward is not vision_transformer.Attention.forward:
        return _unknown_form(module)
    return ""


def last_stage(network: nn.Module) -> str | None:
    """How the names of a pyramid's last stage begin; None for a plain transformer. The stage need not be there: an extractor of timm's
    may have left it out."""
    if isinstance(getattr(network, "stages", None), (nn.ModuleList, nn.Sequential)):
        known = getattr(network, "feature_info", None)
        name = known[-1]["module"] if isinstance(known, list) and known else ""
        return f"{name}." if name.startswith("stages.") else f"stages.{len(network.stages) - 1}."
    if isinstance(network, FeatureDictNet):
        stages = network.feature_info.info
        pyramid = stages[0]["reduction"] < stages[-1]["reduction"]
        return stages[-1]["module"].replace(".", "_") + "." if pyramid else None
    if hasattr(network, "block4") and not hasattr(network, "block5"):
        return "block4."
    return None
