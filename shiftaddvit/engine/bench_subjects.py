"""The models that are measured."""

from copy import deepcopy

import torch
from torch import nn

from shiftaddvit.layers.attention import AngularAttention
from shiftaddvit.reparam import calibrate, recipes, reparameterize


def converted(dense: nn.Module, recipe: str) -> nn.Module:
    """A copy of the model in the form of a recipe, with no token convolution left at zero and hash functions trained on noise."""
    model = reparameterize(deepcopy(dense), recipes[recipe])
    for module in model.modules():
        if isinstance(module, AngularAttention) and module.token_conv is not None:
            nn.init.normal_(module.token_conv.weight, std=0.1)
    if any(isinstance(module, AngularAttention) and module.hash is not None for module in model.modules()):
        size = getattr(model.patch_embed, "img_size", None) or (224, 224)
        calibrate(model, torch.randn(2, 3, *size))
    return model.eval()
