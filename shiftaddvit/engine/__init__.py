"""Fused inference: a model, dense or converted, as a short list of kernels (docs/engine.md)."""

from .deploy import deploy
from .engine import Engine
from .lower import lower
from .program import Launch, Program

__all__ = ["Engine", "Launch", "Program", "deploy", "lower"]
