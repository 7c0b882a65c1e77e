"""Recipes, and putting them into models: the only place that knows both models and layers."""

from .calibrate import calibrate
from .recipe import Recipe, recipes
from .surgery import Report, reparameterize

__all__ = ["Recipe", "Report", "calibrate", "recipes", "reparameterize"]
