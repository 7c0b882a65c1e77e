"""PVTv1's four sizes in timm's registry: `timm.create_model("pvt_tiny", num_classes=10, img_size=64)`."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from shiftaddvit.errors import UserError

from .pvt_v1 import PyramidVisionTransformer


# timm's registry calls an entry with its own keywords (pretrained_cfg, features_only …) beside the model's: hence the **kwargs.
def _create(name: str, depths: tuple[int, ...], pretrained: bool, kwargs: dict) -> PyramidVisionTransformer:
    if pretrained:
        raise UserError(f"{name} has no weights to download here; create it without and use shiftaddvit.load_pretrained(model, file)")
    features = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"}
    return build_model_with_cfg(PyramidVisionTransformer, name, False, feature_cfg=features, **{"depths": depths, **kwargs})


_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": False,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed1.proj",
    "classifier": "head",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")})


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny: 13.2 M parameters, published top-1 75.1 %."""
    return _create("pvt_tiny", (2, 2, 2, 2), pretrained, kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Small: 24.5 M parameters."""
    return _create("pvt_small", (3, 4, 6, 3), pretrained, kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Medium: 44.2 M parameters."""
    return _create("pvt_medium", (3, 4, 18, 3), pretrained, kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Large: 61.4 M parameters."""
    return _create("pvt_large", (3, 8, 27, 3), pretrained, kwargs)
