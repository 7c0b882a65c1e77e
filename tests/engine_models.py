"""Small models of every family, dense and converted, with no weight left at its initial value; their engines, and how far these are off."""

from dataclasses import replace
from functools import cache

import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import shiftaddvit as sav
from shiftaddvit.engine import Engine, Program, deploy
from shiftaddvit.layers.hashing import HashConfig
from shiftaddvit.models.pvt_v1 import PyramidVisionTransformer
from shiftaddvit.reparam import Recipe

SIZE = 32
PYRAMID = dict(
    depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 2), mlp_ratios=(2, 2, 2, 2), sr_ratios=(4, 2, 1, 1), num_classes=7
)
PLAIN = dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7)
FAMILIES = {
    "pvt_v2": (PyramidVisionTransformerV2, PYRAMID),
    "pvt_v1": (PyramidVisionTransformer, PYRAMID | dict(img_size=SIZE)),
    "vit": (VisionTransformer, PLAIN),
}

ADDERS = ("addernet", "shiftaddnet")
"""Networks of sums of nearly equal parts, each behind a norm: images that differ by 1e-6 give logits that differ by up to a half."""
PAIRS = [
    (family, recipe) for family in FAMILIES for recipe in sav.recipes if (family, recipe) != ("vit", "sra-linear") and recipe not in ADDERS
]
"""Every family and recipe whose logits can be compared; attention without spatial reduction takes no `sra-linear`."""


def dense(family: str, **more) -> nn.Module:
    torch.manual_seed(0)
    make, args = FAMILIES[family]
    return randomised(make(**(args | more)))


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter moved, so that nothing is zero or one by its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def converted(family: str, recipe: Recipe | str, **more) -> nn.Module:
    recipe = sav.recipes[recipe] if isinstance(recipe, str) else recipe
    recipe = replace(recipe, hash=HashConfig(bits=4, anchors=5, top=3, steps=2, codes=recipe.hash.codes))
    model = randomised(sav.reparameterize(dense(family, **more), recipe))
    if recipe.add == "ksh" or recipe.attention == "ecoformer":
        sav.calibrate(model, images(2, seed=9))
    return model.eval()


def images(count: int, seed: int = 1, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


FLOAT32 = 1e-4


@cache
def published() -> nn.Module:
    return converted("pvt_v2", "ours-quant-moe")


@torch.no_grad()
def error(engine: Engine | Program, model: nn.Module, x: torch.Tensor) -> float:
    """Largest error of the logits over their largest value, of the worst image but one: codes and routes are decisions, and a value
    within rounding of its threshold may fall on either side on another machine."""
    expected = model(x)
    y = engine.run(x) if isinstance(engine, Program) else engine(x)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    errors = ((y - expected).abs().amax(1) / expected.abs().max()).sort().values
    assert errors[-1] < 0.1
    return float(errors[-2])


def engine_of(model: nn.Module, **more) -> Engine:
    return deploy(model, image_size=SIZE, **more)
