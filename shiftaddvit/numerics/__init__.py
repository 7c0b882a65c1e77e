"""Values and straight-through gradients of the primitives; torch only."""

from .binarize import binarize, binary_threshold
from .fixed_point import fixed_point
from .power_of_two import exponent_range, quantize_ps, quantize_q

__all__ = ["binarize", "binary_threshold", "exponent_range", "fixed_point", "quantize_ps", "quantize_q"]
