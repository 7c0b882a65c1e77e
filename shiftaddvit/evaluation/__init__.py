"""How good a model is, and whether two differ."""

from shiftaddvit.evaluation.accuracy import Evaluation, Paired, compare, evaluate

__all__ = ["Evaluation", "Paired", "compare", "evaluate"]
