"""Going back and forth between the method's stages: attention first with multiplying linears, then the linears as the recipe says."""

from dataclasses import replace

import torch
from torch import nn

from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.shift import ShiftLinear

from .recipe import Recipe
from .surgery import Report, convert_linears


def attention_only(recipe: Recipe) -> Recipe:
    """The recipe of the first stage: the same attention, every linear a multiplication."""
    overrides = tuple(
        (pattern, {column: value for column, value in change.items() if column in ("attention", "add")})
        for pattern, change in recipe.overrides
    )
    return replace(recipe, attn_linear="mult", mlp="mult", overrides=tuple(entry for entry in overrides if entry[1]))


def converts_attention(model: nn.Module) -> bool:
    """Whether the recipe changed any attention, so that a first stage has something to train."""
    recipe = model.shiftaddvit_recipe
    return recipe.attention != "keep" or any("attention" in change for _, change in recipe.overrides)


def converts_linears(model: nn.Module) -> bool:
    """Whether the recipe changes any linear layer, so that a second stage has something to train; true in the first stage too."""
    recipe = model.shiftaddvit_recipe
    columns = [recipe.attn_linear, recipe.mlp]
    columns += [change[column] for _, change in recipe.overrides for column in ("attn_linear", "mlp") if column in change]
    return any(column != "mult" for column in columns)


def to_attention_stage(model: nn.Module) -> nn.Module:
    """Put every converted linear back to the dense linear it holds: its latent weights, or its first expert. What the shift experts
    learned is lost, so this is the start of a run, not a step back in one."""
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
    if not isinstance(module, ShiftLinear):
        return None
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    linear = linear.to(next(module.parameters()).device)
    with torch.no_grad():
        linear.weight.copy_(module.dense_weight())
        if module.bias is not None:
            linear.bias.copy_(module.bias)
    return linear.train(module.training)
