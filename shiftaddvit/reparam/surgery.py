"""Swapping the primitives of a pre-trained model, its weights inherited exactly."""

from zlib import crc32

import torch
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from torch import nn

from shiftaddvit.baselines.adder_attention import AdderAttention
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.baselines.performer import PerformerAttention
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import SoftmaxAttention

from .convert_layers import convert_linears, replace_module
from .decay import tell_timm
from .recipe import Recipe, as_recipe
from .report import Report
from .sites import AttentionSite, MlpSite, find_rest, find_sites


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
    names = _linear_names(attentions, mlps, recipe)
    if recipe.rest != "mult" or any("rest" in change for _, change in recipe.overrides):
        names += [site.name for site in find_rest(model, attentions, mlps)]
    lost = recipe.unmatched(names)
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
    if recipe.attention == "sra-linear":
        return getattr(site.module, "pool", None) is not None
    # A plain transformer's attention already is MSA.
    return recipe.attention == "msa" and site.kind != "sra"


def _check_attention(site: AttentionSite, recipe: Recipe) -> None:
    here = recipe.at(site.name)
    codes = recipe.overridden(site.name).get("add", "none")
    if codes != here.add and here.attention != "linear":
        raise UserError(f"an override sets add = {codes!r} for {site.name}: it needs attention = 'linear' there, not {here.attention!r}")
    hashed = here.attention == "ecoformer" or here.add == "ksh"
    if site.kind == "split" and not _stays(site, here) and (here.attention != "linear" or hashed or here.angular.shared_qk):
        raise UserError(
            f"{site.name} ({type(site.module).__name__}) takes attention 'keep' or 'linear' with add 'none' or 'quant', and separate queries "
            f"and keys; the recipe says attention = {here.attention!r}, add = {here.add!r}, angular.shared_qk = {here.angular.shared_qk}"
        )
    if here.attention == "sra-linear" and not _stays(site, here) and (site.kind != "sra" or site.prefix_tokens):
        why = "it has a class token" if site.kind == "sra" else "it is no attention with spatial reduction"
        raise UserError(f"{site.name} ({type(site.module).__name__}) cannot take attention = 'sra-linear': {why}; pyramids (PVT) take it")
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
        replace_module(model, site.name, _rebuild(site, here, report))


def _rebuild(site: AttentionSite, recipe: Recipe, report: Report) -> nn.Module:
    dense, name = site.module, site.name
    if site.kind == "split":
        return _rebuild_split(site, recipe, report)
    heads = dense.num_heads
    if recipe.attention == "sra-linear":
        return _pooled(site, report)
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
        attention = _core(site, recipe, qkv, q_norm, k_norm, report)
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


def _core(
    site: AttentionSite, recipe: Recipe, qkv: nn.Linear, q_norm: nn.Module | None, k_norm: nn.Module | None, report: Report
) -> nn.Module:
    """The attention between its projections, as the recipe names it."""
    dense, name = site.module, site.name
    projections = (qkv, dense.proj, dense.num_heads, dense.proj.in_features // dense.num_heads)
    if recipe.attention == "performer":
        report.made.append((f"{name}.directions", f"orthogonal random features, seed {recipe.performer.seed}"))
        return PerformerAttention(*projections, recipe.performer, crc32(name.encode()), q_norm, k_norm)
    if recipe.attention == "adder":
        return AdderAttention(*projections, recipe.adder_attention, q_norm, k_norm)
    if recipe.attention == "ecoformer":
        attention: nn.Module = EcoformerAttention(*projections, recipe.hash, q_norm)
    else:
        add = {"none": None, "quant": recipe.binary, "ksh": recipe.hash}[recipe.add]
        attention = site.linear_form(*projections, add, recipe.angular, site.prefix_tokens, q_norm, k_norm)
    if attention.token_conv is not None:
        report.made.append((f"{name}.token_conv.weight", "zeros"))
    if attention.hash is not None:
        report.made.append((f"{name}.hash", "uncalibrated: shiftaddvit.calibrate fills it"))
    return attention


def _pooled(site: AttentionSite, report: Report) -> nn.Module:
    """PVTv2's linear spatial reduction: the picture pooled to 7×7 before its keys and values. The 1×1 convolution starts from the sums
    over the old one's windows, which is the same function of a picture that is constant over each window."""
    dense, name = site.module, site.name
    attention = SpatialReductionAttention(dense.q.in_features, dense.num_heads, linear_attn=True, qkv_bias=dense.q.bias is not None,
                                          attn_drop=dense.attn_drop.p, proj_drop=dense.proj_drop.p)  # fmt: skip
    attention.q, attention.kv, attention.proj = dense.q, dense.kv, dense.proj
    report.used.extend((f"{name}.{part}", f"{name}.{part}") for part in ("q", "kv", "proj"))
    with torch.no_grad():
        if dense.sr is None:
            attention.sr.weight.copy_(torch.eye(dense.q.in_features)[:, :, None, None])
            attention.sr.bias.zero_()
            report.made.extend(((f"{name}.sr", "the identity"), (f"{name}.norm", "scale one, shift zero")))
        else:
            attention.sr.weight.copy_(dense.sr.weight.sum((2, 3), keepdim=True))
            attention.sr.bias.copy_(dense.sr.bias)
            attention.norm.load_state_dict(dense.norm.state_dict())
            report.used.extend(((f"{name}.sr", f"{name}.sr, summed over its window"), (f"{name}.norm", f"{name}.norm")))
    return attention.to(dense.proj.weight.device).train(dense.training)


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
