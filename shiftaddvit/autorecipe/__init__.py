"""Auto-recipe: which primitive goes where, from measured tables under a budget, by exact optimisation (docs/search.md)."""

from .budget import Budget
from .check import additivity, measure_together
from .costs import CostTable, energy_table
from .latency import latency_table
from .options import options_of
from .result import Found, Point
from .search import Goal, Tables, search, solve

__all__ = [
    "Budget", "CostTable", "Found", "Goal", "Point", "Tables", "additivity", "energy_table", "latency_table", "measure_together", "options_of",
    "search", "solve",
]  # fmt: skip
