"""From a model to a program. A new family of models is one line in `_FAMILIES`."""

from collections.abc import Callable

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from shiftaddvit.errors import UserError
from shiftaddvit.models.pvt_v1 import PyramidVisionTransformer

from .lower_attention import mixes_images
from .program import Program, Step
from .pvt import lower_pvt_v1, lower_pvt_v2
from .vit import lower_vit
from .weights import Preparation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FAMILIES: dict[type, Callable[[nn.Module, tuple[int, int], Preparation], list[Step]]] = {
    PyramidVisionTransformerV2: lower_pvt_v2,
    PyramidVisionTransformer: lower_pvt_v1,
    VisionTransformer: lower_vit,
    VisionTransformerDistilled: lower_vit,
}


@torch.no_grad()
def lower(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    image_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Program:
    """The program that computes what `model` computes in evaluation mode. The model is not changed and shares nothing with it.

    `image_size` is by default the one the model was made for; `device` the model's. UserError names the first module that has no
    lowering, an image size that does not fit, or a dtype other than float32, bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise UserError("give the model itself: unwrap it with .module (DDP) or ._orig_mod (torch.compile) first")
    family = _FAMILIES.get(type(model))
    if family is None:
        raise UserError(
            f"the engine has no lowering for {type(model).__name__}; allowed: PVTv2 and ViT/DeiT of timm, PVTv1, dense or converted (GNT: nvs.engine.deploy_gnt). "
            "Run the model itself, under torch.compile"
        )
    device = torch.device(device) if device is not None else next(model.parameters()).device
    if device.type == "meta":
        raise UserError("the model has no weights (device meta): load them before deploy")
    size = _image_size(model, image_size)
    prep = Preparation(dtype, device)
    steps = family(model, size, prep)
    return Program(tuple(steps), dtype, model.in_chans, size, steps[-1].outputs, mixes_images(model), tuple(prep.notes))


def _image_size(model: nn.Module, asked: int | tuple[int, int] | None) -> tuple[int, int]:
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else tuple(asked)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"image_size must be a positive number or (height, width), got {asked!r}")
        return size
    made_for = getattr(model.patch_embed, "img_size", None)
    if made_for is not None:
        return tuple(made_for)
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("input_size"):
        return tuple(config["input_size"][1:])
    raise UserError(f"{type(model).__name__} does not say which images it takes: give image_size")
