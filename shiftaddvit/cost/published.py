"""Where the published op lists differ from the layers of this project: what mode `paper` puts in their place."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.reparam.sites import last_stage

from .operations import Nest, Operation


@dataclass(frozen=True)
class HashedAttention:
    """An Ecoformer attention."""

    name: str
    """Module name."""
    heads: int
    head_dim: int
    bits: int
    """Length of a code."""
    anchors: int
    """Anchor tokens a head."""


@dataclass(frozen=True)
class AttentionSites:
    """What the published op lists treat specially in a model."""

    last_stage: tuple[str, ...]
    """Attention modules of a pyramid's last stage, which keep their softmax."""
    hashed: tuple[HashedAttention, ...]
    """Ecoformer attentions."""
    converted: bool
    """Whether the attention of the model was rebuilt by a recipe."""

    def in_last_stage(self, name: str) -> bool:
        """Whether a module is, or lies in, an attention of the last stage."""
        return any(name == site or name.startswith(site + ".") for site in self.last_stage)


def attention_sites(model: nn.Module) -> AttentionSites:
    """Find them."""
    prefix = last_stage(model)
    last, hashed = [], []
    for name, module in model.named_modules():
        if prefix is not None and name.startswith(prefix) and hasattr(module, "proj") and (hasattr(module, "qkv") or hasattr(module, "kv")):
            last.append(name)
        if isinstance(module, EcoformerAttention):
            hashed.append(HashedAttention(name, module.heads, module.head_dim, module.add.bits, module.add.anchors))
    recipe = getattr(model, "shiftaddvit_recipe", None)
    return AttentionSites(tuple(last), tuple(hashed), recipe is not None and recipe.attention != "keep")


def published_operations(operations: Iterable[Operation], sites: AttentionSites) -> list[Operation]:
    """The op list as published.

    - In a converted pyramid the last stage's attention has one multiplication linear for q, k and v and one for its projection, without
      mixtures and routers.
    - Ecoformer's attention has one linear each for the shared query and key and for the value; what its functions do is all multiplications.
    """
    result: list[Operation] = []
    done: set[str] = set()
    for operation in operations:
        site = next((h for h in sites.hashed if operation.name.startswith(h.name + ".") or operation.name == h.name), None)
        if site is not None and operation.name != f"{site.name}.proj":
            if operation.name == f"{site.name}.qkv" and site.name not in done:
                result.extend(_hashed(site, operation))
                done.add(site.name)
            continue
        if sites.converted and sites.in_last_stage(operation.name):
            operation = _dense(operation)
            if operation is None:
                continue
            if _completes_query(result, operation):
                operation = replace(operation, name=operation.name.removesuffix("kv") + "qkv", M=operation.M + result.pop().M)
        result.append(operation)
    return result


def _dense(operation: Operation) -> Operation | None:
    """A mixture's first expert as the plain layer it came from; None for its other experts, its router and its dispatch."""
    if not operation.experts:
        own_router = operation.name.endswith(".router")
        return None if own_router or operation.kind == "dispatch" else operation
    if any(expert.index for expert in operation.experts):
        return None
    mixture = operation.experts[-1].mixture
    return replace(operation, name=mixture, experts=()) if isinstance(operation, Nest) else replace(operation, experts=())


def _completes_query(result: list[Operation], operation: Operation) -> bool:
    if not result or not isinstance(operation, Nest) or not isinstance(result[-1], Nest):
        return False
    before = result[-1]
    return operation.name.endswith(".kv") and before.name == operation.name.removesuffix("kv") + "q" and before.N == operation.N


def _hashed(site: HashedAttention, qkv: Nest) -> list[Nest]:
    """Two linears that hooks see, and six functions that they do not."""
    name, heads, d, tokens, code = site.name, site.heads, site.head_dim, qkv.N, site.bits
    half = replace(qkv, M=qkv.M // 2)

    def function(part: str, rows: int, inner: int, columns: int) -> Nest:
        return Nest(f"{name}.{part}", "product", "mult", heads, rows, inner, columns, leaf=False)

    return [
        replace(half, name=f"{name}.to_qk"),
        replace(half, name=f"{name}.to_v"),
        function("hash.distance", tokens * site.anchors, d, 1),
        function("hash.project", tokens, site.anchors, code),
        function("normaliser", tokens, code, 1),
        function("context", code, tokens, d),
        function("output", tokens, code, d),
        function("scale", tokens, d, 1),
    ]
