"""What a search found, as data and as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shiftaddvit.conditions import conditions
from shiftaddvit.evaluation.sensitivity import Sensitivity
from shiftaddvit.reparam import Recipe
from shiftaddvit.search_terms import COSTS, DAMAGES, DENSE, UNITS

from .budget import Budget
from .check import Joint
from .costs import CostTable, damages

SHOWN = 16
"""Points of the front in the table for people; the JSON result has all."""


@dataclass(frozen=True)
class Point:
    """One choice for the whole network, and what the tables say of it."""

    choice: Mapping[str, str]
    """Option by site."""
    totals: Mapping[str, float]
    """Every quantity, predicted: costs of the whole network, damages as sums over sites."""


@dataclass(frozen=True)
class Found:
    """The answer of a search."""

    recipe: Recipe
    """For `reparameterize`, `convert` and `finetune`."""
    budgets: tuple[Budget, ...]
    """As given."""
    met: bool
    """Whether all budgets can be met; otherwise `point` is the nearest there is."""
    minimised: str
    """The quantity that was minimised."""
    damage: str
    """First axis of the front."""
    cost: str
    """Second axis of the front."""
    point: Point
    """The optimum, or the nearest point."""
    dense: Point
    """The network as it was."""
    front: tuple[Point, ...]
    """Pareto-optimal points, by falling cost."""
    rows: Mapping[str, Point]
    """Shipped recipes, by name."""
    left_out: Mapping[str, Mapping[str, str]]
    """By site and option that no point of the front needs: the option that is no worse in damage and cost."""
    costs: tuple[CostTable, ...]
    """The cost tables."""
    sensitivity: Sensitivity
    """The damage table."""
    together: Joint | None = None
    """The found network measured as a whole, before fine-tuning; None without images."""
    seconds: float = 0.0
    """For the optimisation."""

    def share(self, point: Point, cost: str) -> float:
        """Of the dense network's cost."""
        return point.totals[cost] / self.dense.totals[cost]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. The tables are files of their own; only their conditions are here."""

        def plain(point: Point) -> dict[str, Any]:
            return {"totals": dict(point.totals), "choice": {site: option for site, option in point.choice.items() if option != DENSE}}

        return {
            "identity": self.sensitivity.identity.to_json(), "budgets": [str(budget) for budget in self.budgets], "met": self.met,
            "minimised": self.minimised, "damage": self.damage, "cost": self.cost, "units": UNITS, "found": plain(self.point),
            "sites": self._sites(), "rest": {table.quantity: table.rest for table in self.costs},
            "together": self.together and self.together.to_json(), "dense": plain(self.dense), "front": [plain(point) for point in self.front],
            "rows": {name: plain(point) for name, point in self.rows.items()},
            "left_out": {site: dict(values) for site, values in self.left_out.items()}, "recipe": self.recipe.to_dict(),
            "tables": {table.quantity: dict(table.conditions) for table in self.costs}
            | {"sensitivity": {"images": self.sensitivity.dense.images, "top1": self.sensitivity.dense.top1, **self.sensitivity.dense.conditions}},
            "seconds": self.seconds, "conditions": conditions("cpu", solver="HiGHS through scipy.optimize.milp"),
        }  # fmt: skip

    def _sites(self) -> list[dict[str, Any]]:
        """What every site becomes, and what the tables say of it there: their sums are the totals of `point`."""
        rows = {(row.where, row.primitive): row for row in self.sensitivity.rows}
        found = []
        for site, option in self.point.choice.items():
            harm = dict.fromkeys(DAMAGES, 0.0) if option == DENSE else damages(rows[site, option], self.sensitivity)
            here, dense = ({table.quantity: table.costs[site][name] for table in self.costs} for name in (option, DENSE))
            found.append({"name": site, "becomes": option, "here": harm | here, "dense": dense})
        return found

    def view(self) -> RenderableType:
        """For people: the answer, the front with the shipped recipes, what is never worth its cost."""
        parts: list[RenderableType] = [Text(line) for line in self.headline()]
        return Group(*parts, self.choice_table(), self.front_table(), self.beaten_table())

    def headline(self) -> list[str]:
        """What was found, and what it costs."""
        lines = []
        if self.met:
            lines.append(f"least {self.minimised} under {', '.join(map(str, self.budgets)) or 'no budget'}: {self._about(self.point)}")
        else:
            lines.append(f"the budgets cannot be met: {', '.join(map(str, self.budgets))}; the nearest point is {self._about(self.point)}")
        if self.together is not None:
            low, high = self.together.interval95
            lines.append(
                f"measured as a whole, before fine-tuning: top-1 {self.together.top1:.2f} %, drop {self.together.drop:+.2f} points "
                f"({low:+.2f} … {high:+.2f}), KL {self.together.kl:.4f} nats"
            )
            lines += self._broken_promises()
        return lines

    def choice_table(self) -> Table:
        """What every site becomes."""
        costs = [table.quantity for table in self.costs]
        table = Table("site", "becomes", f"{self.damage}, {UNITS[self.damage]}", *(f"{cost}, of dense here" for cost in costs), title="found")
        for column in table.columns[2:]:
            column.justify = "right"
        rows = {(row.where, row.primitive): row for row in self.sensitivity.rows}
        for site, option in self.point.choice.items():
            row = rows.get((site, option))
            harm = {"kl": row.kl, "loss": row.loss - self.sensitivity.dense.loss, "drop": -row.difference}[self.damage] if row else 0.0
            shares = (f"{t.costs[site][option] / t.costs[site][DENSE]:.2f}" for t in self.costs)
            table.add_row(site, option, f"{harm:.4f}" if row else "", *shares)
        return table

    def front_table(self) -> Table:
        """The front and the shipped recipes, by falling cost."""
        others = [q for q in ("kl", "drop", *(t.quantity for t in self.costs)) if q not in (self.damage, self.cost)]
        front = _spread(self.front, SHOWN)
        table = Table(title=f"front: {self.damage} against {self.cost}, {len(front)} of {len(self.front)} points; damages are sums over sites, "
                      "before fine-tuning")  # fmt: skip
        table.add_column("")
        for quantity in (self.cost, self.damage, *others):
            table.add_column(f"{quantity}, {UNITS[quantity]}", justify="right")
            if quantity in COSTS:
                table.add_column("of dense", justify="right")
        table.add_column("sites changed", justify="right")
        named = [(f"  {name}", point) for name, point in self.rows.items()] + [("  dense", self.dense)]
        curve = [("front", point) for point in front if point.choice != self.point.choice]
        answer = ("▸ found" if self.met else "▸ nearest", self.point)
        for name, point in sorted((*curve, answer, *named), key=lambda entry: -entry[1].totals[self.cost]):
            cells = []
            for quantity in (self.cost, self.damage, *others):
                cells.append(f"{point.totals[quantity]:.4g}")
                if quantity in COSTS:
                    cells.append(f"{self.share(point, quantity):.3f}")
            changed = sum(option != DENSE for option in point.choice.values())
            table.add_row(name, *cells, f"{changed} of {len(point.choice)}", style="bold" if name.startswith("▸") else None)
        return table

    def beaten_table(self) -> Table:
        """Options that another one of the same site beats, and where they cost more than leaving the site as it is."""
        table = Table("option", "sites that could take it", "beaten at", f"more {self.cost} than dense at",
                      title=f"options that another beats: no worse in {self.damage} and {self.cost}")  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        costs = next(t for t in self.costs if t.quantity == self.cost).costs
        for option in sorted({option for values in self.left_out.values() for option in values} - {DENSE}):
            open_to = [site for site in self.point.choice if option in costs[site]]
            beaten = sum(option in self.left_out.get(site, {}) for site in open_to)
            dearer = sum(costs[site][option] > costs[site][DENSE] for site in open_to)
            table.add_row(option, str(len(open_to)), str(beaten), str(dearer))
        return table

    def _about(self, point: Point) -> str:
        parts = [f"{self.damage} {point.totals[self.damage]:.4g} {UNITS[self.damage]}"]
        parts += [
            f"{t.quantity} {point.totals[t.quantity]:.4g} {UNITS[t.quantity]} ({self.share(point, t.quantity):.3f} of dense)" for t in self.costs
        ]
        return ", ".join(parts)

    def _broken_promises(self) -> list[str]:
        measured = {"drop": self.together.drop, "kl": self.together.kl, "loss": self.together.loss}
        return [
            f"that is over the budget {budget}: effects of sites do not add up here; give a lower one"
            for budget in self.budgets
            if self.met and budget.quantity in measured and measured[budget.quantity] > budget.limit
        ]


def _spread(points: tuple[Point, ...], count: int) -> list[Point]:
    """`count` of the points at even distances in the list, both ends among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(index * (len(points) - 1) / (count - 1))] for index in range(count)]
