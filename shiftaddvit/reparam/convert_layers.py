"""Swapping linear layers and convolutions for those of other primitives, each starting from the dense weight it has."""

from collections.abc import Callable

from torch import nn

from shiftaddvit.layers.adder import NormedAdder, ShiftAdder
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.shift import ShiftConv2d, ShiftLinear

from .recipe import Recipe
from .report import Report
from .sites import MlpSite, RestSite, find_rest, find_sites


def convert_linears(model: nn.Module, recipe: Recipe, report: Report) -> None:
    """Swap the linears of every attention and MLP, and all other layers, as `recipe` says, each starting from the dense weight it has now."""
    attentions, mlps = find_sites(model)
    rest = find_rest(model, attentions, mlps)
    for site in attentions:
        for linear in site.linears:
            name = f"{site.name}.{linear}"
            swap_layer(model, name, recipe.at(name).attn_linear, recipe, report)
    for site in mlps:
        _convert_mlp(model, site, recipe, report)
    for site in rest:
        _convert_rest(model, site, recipe.at(site.name), report)


def _convert_mlp(model: nn.Module, site: MlpSite, recipe: Recipe, report: Report) -> None:
    here = recipe.at(site.name)
    if here.mlp == "moe" and here.moe.router == "mlp":
        to_shift = _mlp_to_shift(here)
        replace_module(model, site.name, MoEMlp.from_mlp(site.module, to_shift, here.moe))
        report.used.append((site.name, f"{site.name}.experts.*"))
        report.made.append((f"{site.name}.router.weight", "normal, standard deviation 1/√dim"))
        return
    for linear in site.linears:
        name = f"{site.name}.{linear}"
        swap_layer(model, name, recipe.at(name).mlp, recipe, report)


def _mlp_to_shift(recipe: Recipe) -> Callable[[nn.Module], nn.Module]:
    def to_shift(mlp: nn.Module) -> nn.Module:
        mlp.fc1 = ShiftLinear.from_linear(mlp.fc1, recipe.shift)
        mlp.fc2 = ShiftLinear.from_linear(mlp.fc2, recipe.shift)
        return mlp

    return to_shift


def _convert_rest(model: nn.Module, site: RestSite, recipe: Recipe, report: Report) -> None:
    if recipe.rest == "mult":
        return
    reason = _why_kept(site, recipe)
    if reason:
        report.left.append((site.name, reason))
        return
    grouped = isinstance(site.module, nn.Conv2d) and site.module.groups > 1
    swap_layer(model, site.name, "shift" if grouped and recipe.rest == "shift-add" else recipe.rest, recipe, report)


def _why_kept(site: RestSite, recipe: Recipe) -> str:
    layer = site.module
    if site.end and recipe.keep_ends:
        return "the first layer and the heads stay as they are (keep_ends)"
    if not isinstance(layer, nn.Conv2d):
        return ""
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"{type(layer).__name__} with padding {layer.padding!r} ({layer.padding_mode}) is no ordinary convolution"
    if recipe.rest == "adder" and (layer.groups > 1 or layer.dilation != (1, 1)):
        return "adder convolutions have neither groups nor dilation"
    return ""


def swap_layer(model: nn.Module, name: str, primitive: str, recipe: Recipe, report: Report) -> None:
    """Swap a linear layer, or a convolution (which has no mixtures), for one of another primitive."""
    dense = model.get_submodule(name)
    convolution = isinstance(dense, nn.Conv2d)
    latents = "exponents and signs" if recipe.shift.variant == "ps" else "the float weight that is rounded to powers of two"
    if primitive == "mult":
        return
    if primitive == "shift":
        replace_module(model, name, ShiftConv2d.from_conv(dense, recipe.shift) if convolution else ShiftLinear.from_linear(dense, recipe.shift))
        report.used.append((f"{name}.weight", f"{name}, as {latents}"))
    elif primitive == "adder":
        replace_module(model, name, NormedAdder.from_dense(dense, recipe.adder))
        report.used.append((f"{name}.weight", f"{name}.adder.weight (the weight, not the function)"))
        report.used.append((f"{name}.bias", f"{name}.norm.bias"))
        report.made.append((f"{name}.norm.weight", "the lengths of the weight's rows"))
    elif primitive == "shift-add":
        replace_module(model, name, ShiftAdder.from_dense(dense, recipe.shift, recipe.adder))
        report.used.append((f"{name}.weight", f"{name}.shift, as {latents}"))
        report.made.append((f"{name}.adder", "diagonal: an increasing function of each channel"))
    else:
        replace_module(model, name, MoELinear.from_linear(dense, recipe.moe, recipe.shift))
        report.used.append((f"{name}.weight", f"{name}.experts.* ({', '.join(recipe.moe.experts)})"))
        report.made.append((f"{name}.router.weight", "normal, standard deviation 1/√dim"))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
