"""Going back and forth between the method's stages: attention first with multiplying linears, then the linears as the recipe says."""

from dataclasses import replace

import torch
from torch import nn

from shiftaddvit.layers.adder import NormedAdder, ShiftAdder
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.shift import ShiftConv2d, ShiftLayer
from shiftaddvit.layers.window import Window

from .convert_layers import convert_linears
from .recipe import Recipe
from .report import Report


def attention_only(recipe: Recipe) -> Recipe:
    """The recipe of the first stage: the same attention, every linear a multiplication."""
    overrides = tuple(
        (pattern, {column: value for column, value in change.items() if column in ("attention", "add")})
        for pattern, change in recipe.overrides
    )
    return replace(recipe, attn_linear="mult", mlp="mult", rest="mult", overrides=tuple(entry for entry in overrides if entry[1]))


def converts_attention(model: nn.Module) -> bool:
    """Whether the recipe changed any attention, so that a first stage has something to train."""
    recipe = model.shiftaddvit_recipe
    return recipe.attention != "keep" or any("attention" in change for _, change in recipe.overrides)


def converts_linears(model: nn.Module) -> bool:
    """Whether the recipe changes any linear layer or convolution, so that a second stage has something to train; true in the first stage too."""
    recipe = model.shiftaddvit_recipe
    columns = [recipe.attn_linear, recipe.mlp, recipe.rest]
    columns += [change[column] for _, change in recipe.overrides for column in ("attn_linear", "mlp", "rest") if column in change]
    return any(column != "mult" for column in columns)


def to_attention_stage(model: nn.Module) -> nn.Module:
    """Put every converted layer back to the dense one it holds: its latent weights, or its first expert. What shift experts and adders
    behind a shift learned is lost, so this is the start of a run, not a step back in one."""
    for name, child in model.named_children():
        dense = _dense(child)
        if dense is not None:
            setattr(model, name, dense)
        else:
            to_attention_stage(child)
    return model


def to_linear_stage(model: nn.Module) -> nn.Module:
    """Convert the linears as the model's recipe says, each starting from the dense weight it has now."""
    convert_linears(model, model.shiftaddvit_recipe, Report())
    return model


def _dense(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (MoELinear, MoEMlp)):
        first = module.experts[0]
        return _dense(first) or to_attention_stage(first)
    if isinstance(module, ShiftAdder):
        return _dense(module.shift)
    if isinstance(module, NormedAdder):
        weight, bias = module.adder.weight, module.norm.bias if module.bias else None
        window = module.adder.window if module.picture else None
    elif isinstance(module, ShiftLayer):
        weight, bias, window = module.dense_weight(), module.bias, module.window if isinstance(module, ShiftConv2d) else None
    else:
        return None
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None) if window is None else _convolution(window, bias is not None)
    dense = dense.to(weight.device)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
    return dense.train(module.training)


def _convolution(window: Window, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        window.in_channels, window.out_channels, window.kernel_size, window.stride, window.padding, window.dilation, window.groups, bias
    )
