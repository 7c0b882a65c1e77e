"""Layers: where parameters live."""

from .adder import AdderConfig, AdderConv2d, AdderLinear, NormedAdder, ShiftAdder
from .attention import AngularAttention, AngularConfig, BinaryConfig, MatAdd, ProjectedAttention, SoftmaxAttention
from .hashing import HashConfig, KernelHash
from .moe import MoEConfig, MoELinear, MoEMlp
from .packed import PackedShiftConv2d, PackedShiftLinear, pack
from .router import Router, Routing, record_routing
from .shift import ShiftConfig, ShiftConv2d, ShiftLayer, ShiftLinear

__all__ = [
    "AdderConfig", "AdderConv2d", "AdderLinear", "AngularAttention", "AngularConfig", "BinaryConfig", "HashConfig", "KernelHash", "MatAdd",
    "MoEConfig", "MoELinear", "MoEMlp", "NormedAdder", "PackedShiftConv2d", "PackedShiftLinear", "ProjectedAttention", "Router", "Routing",
    "ShiftAdder", "ShiftConfig", "ShiftConv2d", "ShiftLayer", "ShiftLinear", "SoftmaxAttention", "pack", "record_routing",
]  # fmt: skip
