"""The least of one quantity under budgets on others, and the whole front between two: integer programs, solved to proven optimality.

With x[s, o] = 1 where site s takes option o, minimise Σ damage[s, o] x[s, o] subject to Σ_o x[s, o] = 1 for every s and, for every
budget, Σ cost[s, o] x[s, o] ≤ limit: a multiple-choice knapsack. HiGHS (scipy.optimize.milp) solves it by branch and bound.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from shiftaddvit.errors import UserError

from .menu import ROUNDING, Menu, Picks

NEIGHBOURS = 1e-6
"""Points of a front nearer than this share of a cost's span are not told apart."""
_SCALE = 1e4
"""Every quantity spans this much in the solver, whose tolerances (1e-6) are absolute."""
# HiGHS' presolve calls feasible programs infeasible where a limit lies within about 1e-8 of a sum; without it they are as quick.
_OPTIONS = {"mip_rel_gap": 0.0, "presolve": False}


def least(menu: Menu, objectives: Sequence[str], limits: Mapping[str, float] | None = None) -> Picks | None:
    """Picks with the least total of the first objective within the limits; of those that tie, with the least of the second, and so
    on. None if no picks are within the limits. Totals count as equal within `ROUNDING` of a quantity's span.

    Raises:
        UserError: an unknown quantity, or scipy is not installed.
    """
    for quantity in (*objectives, *(limits or {})):
        menu.check(quantity)
    limits = dict(limits or {})
    lean = menu.useful(tuple(dict.fromkeys((*objectives, *limits))))
    found = None
    for objective in objectives:
        better = _solve(lean, objective, limits)
        if better is None:
            # Only the first program can be without a solution: a later one has that of the one before.
            return found and menu.picks(lean.choice(found))
        found = better
        limits[objective] = min(lean.total(objective, found), limits.get(objective, np.inf))
    return menu.picks(lean.choice(found))


def nearest(menu: Menu, limits: Mapping[str, float]) -> Picks:
    """Picks whose largest excess over the limits, each relative to its limit, is the least: what comes nearest to budgets that
    cannot be met together."""
    for quantity in limits:
        menu.check(quantity)
    return _solve(menu, None, dict(limits))


def front(menu: Menu, damage: str, cost: str, limits: Mapping[str, float] | None = None, points: int | None = None) -> list[Picks]:
    """Pareto-optimal picks in (damage, cost), by falling cost and rising damage, from the least damage to the least cost.

    Every entry is on the front exactly: no picks within the limits are better in one and no worse in the other. With `points` None
    these are all there are (those nearer than `NEIGHBOURS` in cost count as one); otherwise neighbours are at least a `points`-th of the
    front's cost range apart, but for the last. Both ends are always among them.
    """
    dearest = least(menu, (damage, cost), limits)
    if dearest is None:
        return []
    cheapest = least(menu, (cost, damage), limits)
    floor = menu.total(cost, cheapest)
    step = NEIGHBOURS * menu.span(cost)
    if points is not None:
        step = max(step, (menu.total(cost, dearest) - floor) / points)
    found = [dearest]
    while (bound := menu.total(cost, found[-1]) - step) > floor:
        found.append(least(menu, (damage, cost), {**(limits or {}), cost: min(bound, (limits or {}).get(cost, np.inf))}))
    if menu.total(cost, found[-1]) > floor + ROUNDING * menu.span(cost):
        found.append(cheapest)
    return found


def _solve(menu: Menu, objective: str | None, limits: Mapping[str, float]) -> Picks | None:
    """One integer program; with `objective` None the largest relative excess over the limits is minimised."""
    optimize = scipy_optimize()
    sizes = [len(names) for names in menu.options.values()]
    starts = np.cumsum([0, *sizes])
    columns = starts[-1] + (objective is None)
    one_each = np.zeros((len(sizes), columns))
    for row, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        one_each[row, start:stop] = 1
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for quantity, limit in limits.items():
        scale = _SCALE / menu.span(quantity)
        row = np.zeros((1, columns))
        row[0, : starts[-1]] = scale * _flat(menu, quantity)
        room = scale * (limit - menu.least(quantity)) + ROUNDING * _SCALE
        if objective is None:
            row[0, -1] = -scale * abs(limit) if limit else -_SCALE
        elif room < 0:
            return None
        constraints.append(optimize.LinearConstraint(row, -np.inf, room))
    weights = np.zeros(columns)
    if objective is None:
        weights[-1] = _SCALE
    else:
        weights[: starts[-1]] = _SCALE / menu.span(objective) * _flat(menu, objective)
    integral = np.ones(columns)
    upper = np.ones(columns)
    if objective is None:
        integral[-1], upper[-1] = 0, np.inf
    solved = optimize.milp(weights, integrality=integral, bounds=optimize.Bounds(0, upper), constraints=constraints, options=_OPTIONS)
    # A single limit at or above the least total can always be met.
    if solved.status == 2 and len(limits) > 1:
        return None
    if solved.status != 0:
        raise RuntimeError(f"the solver gave up: {solved.message}")
    picks = tuple(int(np.argmax(solved.x[start:stop])) for start, stop in zip(starts, starts[1:], strict=False))
    for quantity, limit in limits.items() if objective else ():
        if menu.total(quantity, picks) > limit + 2 * ROUNDING * menu.span(quantity):
            raise RuntimeError(f"the solver's answer has {quantity} {menu.total(quantity, picks)}, over its limit {limit}")
    return picks


def _flat(menu: Menu, quantity: str) -> np.ndarray:
    """Costs of all options of all sites above the cheapest option of their site."""
    return np.concatenate([column - column.min() for column in menu.costs[quantity]])


def scipy_optimize() -> ModuleType:
    """scipy.optimize. UserError if it is not installed."""
    try:
        import scipy.optimize
    except ImportError:
        raise UserError("the search needs scipy: install shiftaddvit[search]") from None
    return scipy.optimize
