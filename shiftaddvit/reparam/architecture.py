"""How to build a model again: its name in timm's registry and the arguments that its weights depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1 with timm)
from shiftaddvit.errors import UserError, unknown

_ALLOWED = (int, float, str, bool, tuple, list, type(None))


@dataclass(frozen=True)
class Architecture:
    """A dense model as timm builds it."""

    name: str
    """Name in timm's registry."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model` besides the name: plain values."""


def create_model(name: str, args: Mapping[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """timm's model `name` (PVTv1 too), remembering how it was built so that `save` can say so. Raises UserError for an unknown
    name, with the nearest ones, and for arguments that the model does not take."""
    args = dict(args or {})
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    wrong = [key for key, value in args.items() if not isinstance(value, _ALLOWED)]
    if wrong:
        raise UserError(f"model argument {wrong[0]!r} must be a plain value, got {type(args[wrong[0]]).__name__}")
    try:
        model = timm.create_model(name, pretrained=pretrained, **args)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take these arguments: {error}") from None
    model.shiftaddvit_architecture = Architecture(name, args)
    return model


def architecture_of(model: nn.Module) -> Architecture:
    """How to build the dense form of `model`: as remembered, or read off a model that timm built and checked against its shapes."""
    if hasattr(model, "shiftaddvit_architecture"):
        return model.shiftaddvit_architecture
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name:
        raise UserError(f"{type(model).__name__} was not built by timm: build it with shiftaddvit.create_model(name, args) to save it")
    args: dict[str, Any] = {"num_classes": model.num_classes}
    embed = getattr(model, "patch_embed", None)
    if embed is not None and getattr(embed, "img_size", None) is not None:
        args["img_size"] = tuple(embed.img_size)
        args["patch_size"] = tuple(embed.patch_size)
    return Architecture(name, args)


def dense_skeleton(architecture: Architecture) -> nn.Module:
    """The dense model with random weights, on the CPU, leaving the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return create_model(architecture.name, architecture.args)
