"""How to build a model again: its name in timm's registry and the arguments that its weights depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from timm.models import FeatureInfo
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


def check_name(name: str) -> None:
    """Raise the UserError for a model that timm does not have, with the nearest names."""
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())


def create_model(name: str, args: Mapping[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """timm's model `name` (PVTv1 too), remembering how it was built so that `save` can say so. Raises UserError for an unknown
    name, with the nearest ones, and for arguments that the model does not take."""
    args = dict(args or {})
    check_name(name)
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
    """How to build the dense form of `model`: as remembered, or read off a model that timm built and checked against its shapes; with
    the number of classes that it has now."""
    classes = {"num_classes": model.num_classes} if isinstance(getattr(model, "num_classes", None), int) else {}
    if hasattr(model, "shiftaddvit_architecture"):
        known = model.shiftaddvit_architecture
        return known if classes.items() <= dict(known.args).items() else replace(known, args={**known.args, **classes})
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name:
        raise UserError(f"{type(model).__name__} was not built by timm: build it with shiftaddvit.create_model(name, args) to save it")
    if isinstance(getattr(model, "feature_info", None), FeatureInfo):
        features = {"features_only": True, "out_indices": tuple(model.feature_info.out_indices)}
        return Architecture(name, _given(model, getattr(model, "model", model)) | features)
    return Architecture(name, _given(model, model) | classes)


def _given(built: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Arguments that timm was given for what it built around `model`, as far as they tell: newer versions of timm remember them."""
    remembered = getattr(built, "_model_args", {})
    args = {key: value for key, value in remembered.items() if key != "num_classes" and isinstance(value, _ALLOWED)}
    embed = getattr(model, "patch_embed", None)
    if embed is not None and getattr(embed, "img_size", None) is not None:
        args["img_size"] = tuple(embed.img_size)
        args["patch_size"] = tuple(embed.patch_size)
    return args


def rebuilt(model: nn.Module) -> tuple[Architecture, nn.Module]:
    """How to build the dense form of `model`, and that form with random weights; pooled as `model` is, which `reset_classifier` may
    have changed."""
    architecture = architecture_of(model)
    dense = dense_skeleton(architecture)
    pool = getattr(model, "global_pool", None)
    if not isinstance(pool, str) or pool == dense.global_pool:
        return architecture, dense
    pooling = {"global_pool": pool}
    if hasattr(model, "fc_norm"):
        pooling["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    architecture = replace(architecture, args={**architecture.args, **pooling})
    return architecture, dense_skeleton(architecture)


def dense_skeleton(architecture: Architecture) -> nn.Module:
    """The dense model with random weights, on the CPU, leaving the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return create_model(architecture.name, architecture.args)
