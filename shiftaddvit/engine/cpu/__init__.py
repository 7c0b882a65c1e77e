"""A program on a CPU: the same steps through the libraries that torch brings (MKL, oneDNN), no compiler (docs/engine.md)."""

from .program import CpuProgram, has_cpu_program, prepare

__all__ = ["CpuProgram", "has_cpu_program", "prepare"]
