"""Small models of every family, built by timm itself."""

import timm
import torch
from torch import nn

from shiftaddvit.layers import AngularAttention
from shiftaddvit.reparam import Recipe, reparameterize

PYRAMID = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "pvt_v2": ("pvt_v2_b0", {**PYRAMID, "depths": (1, 1, 1, 1)}),
    "pvt_v1": ("pvt_tiny", {**PYRAMID, "img_size": 32, "depths": (1, 1, 1, 1)}),
    "vit": ("vit_tiny_patch16_224", PLAIN),
    "deit": ("deit_tiny_distilled_patch16_224", PLAIN),
}
PYRAMIDS = ("pvt_v2", "pvt_v1")


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def built(family: str, recipe: Recipe | str | None = "ours-quant-moe", **args) -> nn.Module:
    """By timm itself; every value differs from its initial one."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    model = timm.create_model(name, **{"num_classes": 5, **own, **args}).eval()
    if recipe is not None:
        reparameterize(model, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def same(a, b) -> bool:
    return all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def attentions(model: nn.Module) -> dict[str, AngularAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AngularAttention)}
