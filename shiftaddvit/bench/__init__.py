"""Measuring speed: `shiftaddvit bench ops | model | train`, and comparing with a stored result."""

from .regress import Regression, is_wrong, regressions
from .train import TrainPlan, bench_training

__all__ = ["Regression", "TrainPlan", "bench_training", "is_wrong", "regressions"]
