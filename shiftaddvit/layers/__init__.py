"""Layers: where parameters live."""

from .attention import AngularAttention, AngularConfig, BinaryConfig, MatAdd, SoftmaxAttention
from .hashing import HashConfig, KernelHash
from .moe import MoEConfig, MoELinear, MoEMlp
from .packed import PackedShiftLinear, pack
from .router import Router, Routing, record_routing
from .shift import ShiftConfig, ShiftLinear

__all__ = [
    "AngularAttention", "AngularConfig", "BinaryConfig", "HashConfig", "KernelHash", "MatAdd", "MoEConfig", "MoELinear", "MoEMlp",
    "PackedShiftLinear", "Router", "Routing", "ShiftConfig", "ShiftLinear", "SoftmaxAttention", "pack", "record_routing",
]
