"""A program on a CPU: the same steps through the libraries that torch brings (MKL, oneDNN), float32, no compiler (docs/engine.md)."""

from .program import CpuProgram, prepare

__all__ = ["CpuProgram", "prepare"]
