"""Plain dense networks and their pre-trained weights. Importing this registers PVTv1 with timm."""

from .checkpoints import LoadReport, load_pretrained, read_weights
from .pvt_v1 import PyramidVisionTransformer
from .pvt_v1_variants import pvt_large, pvt_medium, pvt_small, pvt_tiny

__all__ = [
    "LoadReport",
    "PyramidVisionTransformer",
    "load_pretrained",
    "pvt_large",
    "pvt_medium",
    "pvt_small",
    "pvt_tiny",
    "read_weights",
]
