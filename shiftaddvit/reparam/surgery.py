"""Swapping the primitives of a pre-trained model, its weights inherited exactly."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import SoftmaxAttention
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.shift import ShiftLinear

from .decay import tell_timm
from .recipe import Recipe, as_recipe
from .sites import AttentionSite, MlpSite, find_sites


@dataclass(frozen=True)
class Report:
    """What became of every part that the recipe touched. Parts not listed are unchanged."""

    used: list[tuple[str, str]] = field(default_factory=list)
    """(pre-trained key or module, where its values are now)."""
    made: list[tuple[str, str]] = field(default_factory=list)
    """(new parameter or module, how it starts)."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(pre-trained key or module, why it is gone)."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(linear layer besides the classifier that no recipe reaches, why): it goes on multiplying."""

    def __str__(self) -> str:
        parts = []
        for title, rows, arrow in (("used", self.used, "→"), ("made", self.made, "·"), ("dropped", self.dropped, "·"), ("left", self.left, "·")):
            if rows or title != "left":
                parts.append(f"{title}: {len(rows)}")
            parts += [f"  {a} {arrow} {b}" for a, b in rows]
        return "\n".join(parts)


def reparameterize(model: nn.Module, recipe: Recipe | str) -> nn.Module:
    """Replace the primitives of `model` (a timm or shiftaddvit dense model) as `recipe` says; in place, and the model is returned.

    `model.shiftaddvit_report` then says which pre-trained values went where, which parameters are new and which were dropped;
    `model.shiftaddvit_recipe` is the recipe. timm's interface stays the model's own; its `no_weight_decay()` names the exponents, signs
    and routers too. UserError for a model that was converted before, a site that cannot take the primitive, a recipe that asks for what
    the model has nothing of, or an override that matches nothing.
    """
    recipe = as_recipe(recipe)
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError(f"the model is already converted (recipe {model.shiftaddvit_recipe.name!r}); start from the dense model")
    attentions, mlps = find_sites(model)
    lost = recipe.unmatched(_linear_names(attentions, mlps, recipe))
    if lost:
        raise UserError(f"no attention or MLP matches the override pattern {lost[0]!r}; names look like {[*attentions, *mlps][0].name!r}")
    report = Report()
    # Everything is checked before anything changes.
    _check_asked(model, attentions, mlps, recipe)
    for site in attentions:
        _check_attention(site, recipe)
    for site in mlps:
        _check_mlp(site, recipe.at(site.name))
    for site in attentions:
        _convert_attention(model, site, recipe, report)
    convert_linears(model, recipe, report)
    report.left.extend(_left(model, attentions, mlps))
    tell_timm(model)
    model.shiftaddvit_recipe, model.shiftaddvit_report = recipe, report
    return model


def _check_asked(model: nn.Module, attentions: list[AttentionSite], mlps: list[MlpSite], recipe: Recipe) -> None:
    """A recipe must not pass over a whole column in silence."""
    asked = {"attention": (recipe.attention, "keep"), "attn_linear": (recipe.attn_linear, "mult"), "mlp": (recipe.mlp, "mult")}
    for column, (value, nothing) in asked.items():
        what, sites = ("MLP", mlps) if column == "mlp" else ("attention", attentions)
        if value != nothing and not sites:
            raise UserError(
                f"{type(model).__name__} has no {what} in a known layout and the recipe has {column} = {value!r}: "
                f"use a recipe with {column} = {nothing!r}, or add the family to reparam/sites.py"
            )


def _left(model: nn.Module, attentions: list[AttentionSite], mlps: list[MlpSite]) -> list[tuple[str, str]]:
    """Linear layers of the converted model that no column of a recipe speaks of, the classifier aside."""
    sites = [site.name for site in attentions] + [site.name for site in mlps]
    reached = tuple(f"{site}.{linear}" for site in sites for linear in ("qkv", "q", "kv", "proj", "fc1", "fc2", "experts"))
    reached += tuple(f"{site.name}.{linear}" for site in attentions for linear in site.linears)
    own_weight = tuple(f"{site.name}.qkv" for site in attentions if "qkv" not in site.linears and site.kind == "linears-only")
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    classifier = {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in classifier:
            continue
        if name in own_weight:
            left.append((name, "its attention reads the weight itself"))
        elif not any(name == site or name.startswith(f"{site}.") for site in reached):
            left.append((name, "in no attention or MLP of a known layout"))
    return left


def _linear_names(attentions: list[AttentionSite], mlps: list[MlpSite], recipe: Recipe) -> list[str]:
    """Names of the linears as they will be called once attention is converted."""
    names = [f"{site.name}.{linear}" for site in mlps for linear in site.linears]
    for site in attentions:
        linears = site.linears if _stays(site, recipe.at(site.name)) else ("qkv", "proj")
        names += [f"{site.name}.{linear}" for linear in linears]
    return names


def _stays(site: AttentionSite, recipe: Recipe) -> bool:
    if recipe.attention == "keep" or site.subtracts or (site.last_stage and recipe.last_stage_softmax):
        return True
    # A plain transformer's attention already is MSA.
    return recipe.attention == "msa" and site.kind != "sra"


def _check_attention(site: AttentionSite, recipe: Recipe) -> None:
    here = recipe.at(site.name)
    codes = recipe.overridden(site.name).get("add", "none")
    if codes != here.add and here.attention != "linear":
        raise UserError(f"an override sets add = {codes!r} for {site.name}: it needs attention = 'linear' there, not {here.attention!r}")
    hashed = here.attention == "ecoformer" or here.add == "ksh"
    if site.kind == "split" and not _stays(site, here) and (hashed or here.angular.shared_qk):
        raise UserError(
            f"{site.name} ({type(site.module).__name__}) takes attention 'keep' or 'linear' with add 'none' or 'quant', and separate queries "
            f"and keys; the recipe says attention = {here.attention!r}, add = {here.add!r}, angular.shared_qk = {here.angular.shared_qk}"
        )
    if site.obstacle and not _stays(site, here):
        raise UserError(
            f"{site.name} ({type(site.module).__name__}) cannot take attention = {here.attention!r} because of {site.obstacle}; "
            "use attention = 'keep' for it (an override), its linears can still shift"
        )


def _check_mlp(site: MlpSite, recipe: Recipe) -> None:
    if recipe.mlp == "moe" and recipe.moe.router == "mlp" and site.mixes_tokens:
        raise UserError(f"{site.name} has a convolution between its linears: moe.router must be 'linear' for it, got 'mlp'")


def _convert_attention(model: nn.Module, site: AttentionSite, recipe: Recipe, report: Report) -> None:
    here = recipe.at(site.name)
    if not _stays(site, here):
        _replace(model, site.name, _rebuild(site, here, report))


def convert_linears(model: nn.Module, recipe: Recipe, report: Report) -> None:
    """Swap the linears of every attention and MLP as `recipe` says, each starting from the dense weight it has now."""
    attentions, mlps = find_sites(model)
    for site in attentions:
        for linear in site.linears:
            name = f"{site.name}.{linear}"
            _swap_linear(model, name, recipe.at(name).attn_linear, recipe, report)
    for site in mlps:
        _convert_mlp(model, site, recipe, report)


def _rebuild(site: AttentionSite, recipe: Recipe, report: Report) -> nn.Module:
    dense, name = site.module, site.name
    if site.kind == "split":
        return _rebuild_split(site, recipe, report)
    heads = dense.num_heads
    head_dim = dense.proj.in_features // heads
    shared = recipe.attention == "ecoformer" or (
        recipe.attention == "linear" and (recipe.add == "ksh" or recipe.angular.shared_qk)
    )
    qkv = _fused_qkv(site, shared, report)
    if recipe.attention == "msa":
        attention: nn.Module = SoftmaxAttention(qkv, dense.proj, heads)
    else:
        q_norm, k_norm = (None, None) if site.kind == "sra" else (dense.q_norm, dense.k_norm)
        if shared and k_norm is not None and not isinstance(k_norm, nn.Identity):
            report.dropped.append((f"{name}.k_norm", "queries and keys share one projection and its norm"))
            k_norm = None
        add = {"none": None, "quant": recipe.binary, "ksh": recipe.hash}[recipe.add]
        if recipe.attention == "ecoformer":
            attention = EcoformerAttention(qkv, dense.proj, heads, head_dim, recipe.hash, q_norm)
        else:
            attention = site.linear_form(
                qkv, dense.proj, heads, head_dim, add, recipe.angular, site.prefix_tokens, q_norm, k_norm
            )
        if attention.token_conv is not None:
            report.made.append((f"{name}.token_conv.weight", "zeros"))
        if attention.hash is not None:
            report.made.append((f"{name}.hash", "uncalibrated: shiftaddvit.calibrate fills it"))
    report.used.append((f"{name}.proj", f"{name}.proj"))
    for child in ("sr", "norm"):
        if site.kind == "sra" and getattr(dense, child, None) is not None:
            report.dropped.append((f"{name}.{child}", "spatial reduction has no place in attention over all tokens"))
    for child in ("attn_drop", "proj_drop"):
        if getattr(getattr(dense, child, None), "p", 0.0) > 0:
            report.dropped.append((f"{name}.{child}", "dropout"))
    return attention.to(dense.proj.weight.device).train(dense.training)


def _rebuild_split(site: AttentionSite, recipe: Recipe, report: Report) -> nn.Module:
    """Linear attention from separate linears without bias for q, k and v, and one for the output."""
    dense, name = site.module, site.name
    *parts, proj = (getattr(dense, linear) for linear in site.linears)
    weight = torch.cat([part.weight.detach() for part in parts])
    qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    qkv.weight.data = weight
    add = recipe.binary if recipe.add == "quant" else None
    attention = site.linear_form(qkv, proj, dense.heads, weight.shape[1] // dense.heads, add, recipe.angular)
    report.used.extend((f"{name}.{linear}", f"{name}.qkv[{part}]") for linear, part in zip(site.linears, "qkv", strict=False))
    report.used.append((f"{name}.{site.linears[-1]}", f"{name}.proj"))
    if attention.token_conv is not None:
        report.made.append((f"{name}.token_conv.weight", "zeros"))
    if dense.dp.p > 0:
        report.dropped.append((f"{name}.dp", "dropout"))
    return attention.to(weight.device).train(dense.training)


def _fused_qkv(site: AttentionSite, shared: bool, report: Report) -> nn.Linear:
    """One linear whose rows are [q; k; v], or [q; v] when queries and keys are shared."""
    dense, name = site.module, site.name
    target = f"{name}.qkv"
    if site.kind == "sra":
        weight = torch.cat([dense.q.weight, dense.kv.weight]).detach()
        bias = torch.cat([dense.q.bias, dense.kv.bias]).detach() if dense.q.bias is not None else None
        sources = [(f"{name}.q", f"{target}[q]"), (f"{name}.kv", f"{target}[k, v]")]
    else:
        weight, bias = dense.qkv.weight.detach(), dense.qkv.bias.detach() if dense.qkv.bias is not None else None
        sources = [(target, target)]
    width = weight.shape[0] // 3
    if shared:
        keep = torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)])
        weight, bias = weight[keep], bias[keep] if bias is not None else None
        sources = [(a, b.replace("[q]", "[q = k]").replace("[k, v]", "[v]")) for a, b in sources]
        report.dropped.append((f"{name} rows of k", "queries and keys share one projection, which starts from q"))
    report.used.extend(sources)
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    fused.weight.data, fused.weight.requires_grad = weight.clone(), True
    if bias is not None:
        fused.bias.data = bias.clone()
    return fused


def _convert_mlp(model: nn.Module, site: MlpSite, recipe: Recipe, report: Report) -> None:
    here = recipe.at(site.name)
    if here.mlp == "moe" and here.moe.router == "mlp":
        to_shift = _mlp_to_shift(here)
        _replace(model, site.name, MoEMlp.from_mlp(site.module, to_shift, here.moe))
        report.used.append((site.name, f"{site.name}.experts.*"))
        report.made.append((f"{site.name}.router.weight", "normal, standard deviation 1/√dim"))
        return
    for linear in site.linears:
        name = f"{site.name}.{linear}"
        _swap_linear(model, name, recipe.at(name).mlp, recipe, report)


def _mlp_to_shift(recipe: Recipe) -> Callable[[nn.Module], nn.Module]:
    def to_shift(mlp: nn.Module) -> nn.Module:
        mlp.fc1 = ShiftLinear.from_linear(mlp.fc1, recipe.shift)
        mlp.fc2 = ShiftLinear.from_linear(mlp.fc2, recipe.shift)
        return mlp

    return to_shift


def _swap_linear(model: nn.Module, name: str, primitive: str, recipe: Recipe, report: Report) -> None:
    linear = model.get_submodule(name)
    if primitive == "mult":
        return
    if primitive == "shift":
        _replace(model, name, ShiftLinear.from_linear(linear, recipe.shift))
        latents = "shift and sign" if recipe.shift.variant == "ps" else "latent"
        report.used.append((f"{name}.weight", f"{name}, as {latents}"))
        return
    _replace(model, name, MoELinear.from_linear(linear, recipe.moe, recipe.shift))
    report.used.append((f"{name}.weight", f"{name}.experts.* ({', '.join(recipe.moe.experts)})"))
    report.made.append((f"{name}.router.weight", "normal, standard deviation 1/√dim"))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
