"""What can be chosen where, and what every choice costs in each quantity: the table that the optimisation reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from shiftaddvit.errors import UserError, unknown

Picks = tuple[int, ...]
"""One option at every site, by position."""

ROUNDING = 1e-9
"""Two sums closer than this share of a quantity's range are taken as equal."""


@dataclass(frozen=True, eq=False)
class Menu:
    """Sites, the options of each, and quantities that add up over sites."""

    options: Mapping[str, tuple[str, ...]]
    """Names of the options, by site."""
    costs: Mapping[str, tuple[Float[NDArray, "options"], ...]]
    """What each option costs, by quantity and, in the order of `options`, by site."""
    rest: Mapping[str, float]
    """What the rest of the network costs, by quantity."""

    def __post_init__(self) -> None:
        for quantity, columns in self.costs.items():
            for site, column in zip(self.options, columns, strict=True):
                if len(column) != len(self.options[site]):
                    raise UserError(f"{quantity} of {site} has {len(column)} values for the options {', '.join(self.options[site])}")
                if not np.isfinite(column).all():
                    raise UserError(f"{quantity} of {site} is not finite for {self.options[site][int(np.argmin(np.isfinite(column)))]!r}")

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(self.options)

    @cached_property
    def quantities(self) -> tuple[str, ...]:
        """What is known of every option."""
        return tuple(self.costs)

    def total(self, quantity: str, picks: Picks) -> float:
        """Of the whole network."""
        self.check(quantity)
        return self.rest[quantity] + float(sum(column[pick] for column, pick in zip(self.costs[quantity], picks, strict=True)))

    def totals(self, picks: Picks) -> dict[str, float]:
        """Every quantity of the whole network."""
        return {quantity: self.total(quantity, picks) for quantity in self.quantities}

    def least(self, quantity: str) -> float:
        """The smallest total there is."""
        self.check(quantity)
        return self.rest[quantity] + float(sum(column.min() for column in self.costs[quantity]))

    def span(self, quantity: str) -> float:
        """Largest total less smallest; 1 where every choice costs the same."""
        return float(sum(np.ptp(column) for column in self.costs[quantity])) or 1.0

    def choice(self, picks: Picks) -> dict[str, str]:
        """Names of the options, by site."""
        return {site: names[pick] for (site, names), pick in zip(self.options.items(), picks, strict=True)}

    def picks(self, choice: Mapping[str, str]) -> Picks:
        """The inverse of `choice`."""
        return tuple(names.index(choice[site]) for site, names in self.options.items())

    def same_everywhere(self, option: str) -> Picks:
        """`option` wherever a site has it, and its first option elsewhere."""
        return tuple(names.index(option) if option in names else 0 for names in self.options.values())

    def useful(self, quantities: Sequence[str]) -> "Menu":
        """Without the options that another option of the same site beats: no dearer in any of the quantities, and cheaper in one (or
        equal in all and listed before). No optimum needs them."""
        kept = []
        for site in range(len(self.sites)):
            values = np.stack([self.costs[quantity][site] for quantity in quantities], axis=1)
            kept.append([index for index in range(len(values)) if not _beaten(values, index)])
        options = {site: tuple(names[index] for index in kept[number]) for number, (site, names) in enumerate(self.options.items())}
        costs = {q: tuple(column[index] for column, index in zip(columns, kept, strict=True)) for q, columns in self.costs.items()}
        return Menu(options, costs, self.rest)

    def check(self, quantity: str) -> None:
        """Raise UserError for a quantity that is not known."""
        if quantity not in self.costs:
            raise unknown("quantity", quantity, self.costs)


def _beaten(values: Float[NDArray, "options quantities"], index: int) -> bool:
    no_dearer = (values <= values[index]).all(axis=1)
    cheaper = (values < values[index]).any(axis=1)
    first = np.arange(len(values)) < index
    return bool((no_dearer & (cheaper | first)).any())
