"""What can be costed by name: any timm model, with or without a recipe, and the two networks for view synthesis."""

import weakref
from dataclasses import dataclass, replace
from functools import lru_cache

import timm
import torch
from torch import Tensor, nn

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.reparam.recipe import LISTED_BY, as_recipe

from .operations import Trace
from .published import AttentionSites, attention_sites
from .trace import trace

LARGEST_IMAGE, LARGEST_BATCH = 8192, 4096
LLFF_RAYS = 504 * 378
"""Rays of a published LLFF image."""
NERF_SAMPLES, NERF_CHUNK = 64 + 128, 65536
"""Points a ray, coarse and fine together, and points a forward."""
GNT_SAMPLES, GNT_VIEWS, GNT_CHUNK = 192, 10, 504
"""Points a ray, source views, and rays a forward: one row of the image."""
VIEW_SYNTHESIS = ("gnt", "nerf")


@dataclass(frozen=True)
class Subject:
    """What one forward of a network does."""

    name: str
    """For tables."""
    trace: Trace
    """Its operations."""
    sites: AttentionSites
    """What the published op lists treat specially."""
    images: int
    """Images in the batch (1 for an image of rays)."""
    image_size: tuple[int, int] | None
    """Height and width."""


def check_sizes(image_size: int | tuple[int, int] | None, batch: int) -> tuple[int, int] | None:
    """Height and width. UserError for sizes that make no sense."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or not all(1 <= side <= LARGEST_IMAGE for side in size)):
        raise UserError(f"image size must be from 1 to {LARGEST_IMAGE} on each side, got {'x'.join(map(str, size))}")
    if not 1 <= batch <= LARGEST_BATCH:
        raise UserError(f"batch must be from 1 to {LARGEST_BATCH}, got {batch}")
    return size


@lru_cache(maxsize=64)
def named_subject(name: str, recipe: str, image_size: tuple[int, int] | None, batch: int) -> Subject:
    """A network by name, on shapes alone. `recipe` is a name, the path of a TOML file, or `dense`."""
    if name in VIEW_SYNTHESIS:
        return _view_synthesis(name, recipe, image_size, batch)
    if not timm.is_model(name):
        raise unknown("model", name, [*timm.list_models(), *VIEW_SYNTHESIS])
    with torch.device("meta"):
        model = _sized(name, image_size)
        if recipe != "dense":
            reparameterize(model, named_recipe(recipe))
    return model_subject(model, f"{name}, {recipe}", image_size or _default_size(model), batch)


def named_recipe(recipe: str) -> Recipe:
    """A shipped recipe or a TOML file."""
    if not recipe.endswith(".toml") and recipe not in recipes:
        raise unknown("recipe", recipe, ["dense", *recipes], LISTED_BY)
    return as_recipe(recipe)


def model_subject(model: nn.Module, name: str, image_size: tuple[int, int] | None, batch: int) -> Subject:
    """A network as it is. Traced again only when its modules changed."""
    return replace(_traced(_Known(weakref.ref(model), _layout(model)), image_size or _default_size(model), batch), name=name)


@dataclass(frozen=True)
class _Known:
    """A network, and what its trace depends on besides its sizes."""

    network: weakref.ref
    layout: tuple


@lru_cache(maxsize=16)
def _traced(known: _Known, image_size: tuple[int, int], batch: int) -> Subject:
    model = known.network()
    channels = int((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0])
    return Subject("", trace(model, (batch, channels, *image_size)), attention_sites(model), batch, image_size)


def _layout(model: nn.Module) -> tuple:
    """Names, types, plain attributes and shapes of parameters of all modules."""
    return tuple((name, type(module), *_plain_attributes(module)) for name, module in model.named_modules())


def _plain_attributes(module: nn.Module) -> tuple:
    plain = (int, float, str, type(None))
    shapes = tuple(tuple(x.shape) for x in module.parameters(recurse=False))
    values = tuple(
        (key, value)
        for key, value in vars(module).items()
        if key != "training" and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
    )
    return shapes, values


def _sized(name: str, image_size: tuple[int, int] | None) -> nn.Module:
    if image_size is None:
        return create_model(name)
    default = timm.get_pretrained_cfg(name)
    if default is not None and tuple(default.input_size[-2:]) == image_size:
        return create_model(name)
    try:
        return create_model(name, {"img_size": image_size})
    except UserError:
        return create_model(name)  # a network without a fixed size


def _default_size(model: nn.Module) -> tuple[int, int]:
    height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
    return int(height), int(width)


def _view_synthesis(name: str, recipe: str, image_size: tuple[int, int] | None, batch: int) -> Subject:
    rays = (image_size[0] * image_size[1] if image_size else LLFF_RAYS) * batch
    size = image_size or (378, 504)
    if name == "nerf":
        if recipe != "dense":
            raise UserError(f"nerf has no recipes: recipe must be 'dense', got {recipe!r}")
        from shiftaddvit.nvs.nerf import NeRFMLP

        with torch.device("meta"):
            network = NeRFMLP()
        found = trace(network, (NERF_CHUNK, 3), (NERF_CHUNK, 3), scale=rays * NERF_SAMPLES / NERF_CHUNK)
    else:
        from shiftaddvit.nvs.gnt import GNT

        with torch.device("meta"):
            model = GNT()
            if recipe != "dense":
                reparameterize(model, named_recipe(recipe))
        points, network = (GNT_CHUNK, GNT_SAMPLES), _Rays(model.net_coarse)
        shapes = [(*points, GNT_VIEWS, width) for width in (35, 4, 1)]
        found = trace(network, *shapes, (*points, 3), (GNT_CHUNK, 3), scale=rays / GNT_CHUNK)
    return Subject(f"{name}, {recipe}", found, attention_sites(network), batch, size)


class _Rays(nn.Module):
    """GNT's transformer, its inputs one by one."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, values: Tensor, ray_diff: Tensor, mask: Tensor, points: Tensor, direction: Tensor) -> Tensor:
        from shiftaddvit.nvs.projector import Seen

        return self.network(Seen(values, ray_diff, mask), points, direction)[0]
