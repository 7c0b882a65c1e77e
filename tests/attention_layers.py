"""Attention layers over every kind of codes, with no weight left at zero."""

import torch
from torch import nn

from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.layers import AngularAttention, AngularConfig, BinaryConfig, HashConfig

ADDS = {"float": None, "quant": BinaryConfig(), "ksh": HashConfig(bits=6, anchors=5, steps=3)}


def attention(add=None, config=AngularConfig(), heads=2, dim=16, prefix=0, cls=AngularAttention, **calibration) -> AngularAttention:
    torch.manual_seed(0)
    parts = 2 if isinstance(add, HashConfig) or config.shared_qk else 3
    qkv, proj = nn.Linear(dim, parts * dim), nn.Linear(dim, dim)
    if cls is EcoformerAttention:
        layer = cls(qkv, proj, heads, dim // heads, add)
    else:
        layer = cls(qkv, proj, heads, dim // heads, add, config, prefix)
    if layer.token_conv is not None:
        nn.init.normal_(layer.token_conv.weight, std=0.2)
    if layer.hash is not None:
        layer.hash.calibrate(torch.randn(2, heads, 9, dim // heads), torch.Generator().manual_seed(0))
    return layer
