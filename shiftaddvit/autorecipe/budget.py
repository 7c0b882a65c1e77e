"""Budgets as people write them: `energy=0.6`, `energy=0.5mJ`, `latency=300us`, `drop=1`."""

import math
import re
from dataclasses import dataclass

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.search_terms import COSTS, UNITS

_FACTORS = {
    "energy": {"uJ": 1e-3, "µJ": 1e-3, "mJ": 1.0, "J": 1e3},
    "latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6},
    "kl": {"nats": 1.0},
    "loss": {"nats": 1.0},
    "drop": {"points": 1.0},
}


@dataclass(frozen=True)
class Budget:
    """A limit on one quantity."""

    quantity: str
    """A name of `UNITS`."""
    limit: float
    """In the quantity's unit, or as a share of the dense network's."""
    share: bool = False
    """Whether `limit` is a share."""

    def __post_init__(self) -> None:
        if self.quantity not in UNITS:
            raise unknown("budget", self.quantity, UNITS)
        least = self.quantity in COSTS
        if not math.isfinite(self.limit) or self.limit < 0 or (least and self.limit == 0):
            raise UserError(f"the budget for {self.quantity} must be a number {'above 0' if least else 'of at least 0'}, got {self.limit:g}")
        if self.share and self.quantity not in COSTS:
            raise UserError(f"the budget for {self.quantity} is in {UNITS[self.quantity]}: only {' and '.join(COSTS)} can be shares")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From `QUANTITY=NUMBER` or `QUANTITY=NUMBERUNIT`; energy and latency without a unit are shares of the dense network's."""
        quantity, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"a budget looks like energy=0.6, energy=0.5mJ, latency=300us or drop=1, got {text!r}")
        if quantity not in UNITS:
            raise unknown("budget", quantity, UNITS)
        found = re.fullmatch(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*([a-zA-Zµ]*)", value)
        factors = _FACTORS[quantity]
        if found is None or found[1].count(".") > 1 or (found[2] and found[2] not in factors):
            raise UserError(f"the budget {text!r} needs a number, and of units one of {', '.join(factors)} or none")
        share = not found[2] and quantity in COSTS
        return cls(quantity, float(found[1]) * (factors[found[2]] if found[2] else 1.0), share)

    def absolute(self, dense: float) -> float:
        """In the quantity's unit, where the dense network has `dense`."""
        return self.limit * dense if self.share else self.limit

    def __str__(self) -> str:
        return f"{self.quantity} ≤ {self.limit:.6g} {'of dense' if self.share else UNITS[self.quantity]}"
