"""Recipes, and putting them into models: the only place that knows both models and layers."""

from .calibrate import calibrate
from .recipe import Recipe, recipes
from .report import Report
from .surgery import reparameterize

__all__ = ["Recipe", "Report", "calibrate", "recipes", "reparameterize"]
