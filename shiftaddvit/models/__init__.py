"""Plain dense networks and their pre-trained weights. Importing this registers PVTv1 with timm."""

from .pvt_v1 import PyramidVisionTransformer
from .pvt_v1_variants import pvt_large, pvt_medium, pvt_small, pvt_tiny

__all__ = ["PyramidVisionTransformer", "pvt_large", "pvt_medium", "pvt_small", "pvt_tiny"]
