"""Published GNT checkpoints: {"net_coarse": …, "feature_net": …}, whose shape is read off the tensors."""

import os
import pickle
from dataclasses import replace

import torch

from shiftaddvit.errors import UserError

from .model import GNT, GNTConfig


def load_published(path: str | os.PathLike, config: GNTConfig | None = None) -> GNT:
    """A GNT with the weights of a published `.pth` file; weights only, strict.

    Width and depth come from the file. If `config` says otherwise, UserError names the field: a model of another shape cannot take
    these weights. Samples and sources come from `config`, as the file does not know them.
    """
    tensors = _read(path)
    found = infer_config(tensors, str(path))
    if config is not None:
        for field in ("width", "depth", "feature_channels", "feature_base"):
            if getattr(config, field) != getattr(found, field):
                raise UserError(f"{path} is a GNT of {field} {getattr(found, field)}, but {field} {getattr(config, field)} was asked")
        found = replace(found, samples=config.samples, sources=config.sources, heads=config.heads)
    model = GNT(found)
    missing, extra = model.load_state_dict(tensors, strict=False)
    if missing or extra:
        raise UserError(f"{path} is not a published GNT: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}")
    return model.eval()


def infer_config(tensors: dict[str, torch.Tensor], source: str) -> GNTConfig:
    """Width, depth and feature sizes from the tensors' shapes."""
    try:
        first = tensors["net_coarse.rgbfeat_fc.0.weight"]
        base = tensors["feature_net.conv1.weight"].shape[0]
        channels = tensors["feature_net.out_conv.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{source} is not a published GNT: no {error}") from None
    prefix = "net_coarse.view_crosstrans."
    depth = 1 + max(int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix))
    return GNTConfig(width=first.shape[0], depth=depth, feature_channels=channels, feature_base=base)


def _read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a whole checkpoint of tensors only: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict) or not isinstance(data.get("net_coarse"), dict) or not isinstance(data.get("feature_net"), dict):
        raise UserError(f"{path} is not a published GNT: it must hold 'net_coarse' and 'feature_net'")
    return {f"{part}.{key.removeprefix('module.')}": value for part in ("net_coarse", "feature_net") for key, value in data[part].items()}
