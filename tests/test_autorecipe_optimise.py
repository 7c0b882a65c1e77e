"""The optimisation is exact: it agrees with brute force and with dynamic programming, and its fronts hold no dominated point."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shiftaddvit.autorecipe.menu import ROUNDING, Menu
from shiftaddvit.autorecipe.optimise import front, least, nearest
from shiftaddvit.errors import UserError


def menu(seed: int, sites: int, options: int, whole: bool = False) -> Menu:
    """Random costs, where what is cheaper does more damage at most sites; with `whole` small whole numbers, which tie often."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, options + 1, sites)

    def column(count: int) -> np.ndarray:
        return rng.integers(0, 4, count).astype(float) if whole else rng.lognormal(0, 1, count)

    names = {f"site{s}": tuple(f"option{o}" for o in range(count)) for s, count in enumerate(counts)}
    costs = {quantity: tuple(column(count) for count in counts) for quantity in ("kl", "energy", "latency")}
    for kl, energy in zip(costs["kl"][1:], costs["energy"][1:], strict=True):
        kl[::-1].sort()
        energy.sort()
    return Menu(names, costs, {"kl": 0.0, "energy": 3.0, "latency": 1.0})


def every(m: Menu) -> list[tuple[int, ...]]:
    return list(product(*(range(len(names)) for names in m.options.values())))


def pareto(m: Menu, limits: dict[str, float] = {}) -> list[tuple[float, float]]:
    """(energy, kl) of the whole front by looking at everything."""
    totals = [m.totals(picks) for picks in every(m)]
    points = {(t["energy"], t["kl"]) for t in totals if all(t[q] <= limit for q, limit in limits.items())}
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))


def by_dynamic_programming(m: Menu) -> list[tuple[float, float]]:
    """The same for larger menus: fronts merged site by site (Nemhauser and Ullmann, 1969)."""
    points = [(m.rest["energy"], m.rest["kl"])]
    for energies, damages in zip(m.costs["energy"], m.costs["kl"], strict=True):
        sums = sorted((e + energy, d + damage) for e, d in points for energy, damage in zip(energies, damages, strict=True))
        points, best = [], np.inf
        for e, d in sums:
            if d < best:
                points.append((e, d))
                best = d
    return points


def close(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> bool:
    return len(found) == len(expected) and np.allclose(found, expected, rtol=1e-7)


def reached(m: Menu, picks: list[tuple[int, ...]]) -> list[tuple[float, float]]:
    return sorted((m.total("energy", p), m.total("kl", p)) for p in picks)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), whole=st.booleans())
@example(seed=123, share=1.0, whole=False)
@settings(max_examples=25, deadline=None)
def test_least_damage_under_budgets_is_that_of_brute_force(seed, share, whole):
    m = menu(seed, 5, 4, whole)
    limits = {q: m.least(q) + share * m.span(q) for q in ("energy", "latency")}
    # A limit is met to within rounding: sums that reach it exactly in other orders differ in the last bit.
    allowed = [m.totals(p) for p in every(m) if all(m.total(q, p) <= limit + ROUNDING * m.span(q) for q, limit in limits.items())]
    found = least(m, ("kl", "energy"), limits)
    if not allowed:
        assert found is None
        return
    assert all(m.total(q, found) <= limit + 1e-8 * m.span(q) for q, limit in limits.items())
    best = min((t["kl"], t["energy"]) for t in allowed)
    assert (m.total("kl", found), m.total("energy", found)) == pytest.approx(best, rel=1e-7)


@given(seed=st.integers(0, 10**6), whole=st.booleans(), limited=st.booleans())
@settings(max_examples=8, deadline=None)
def test_whole_front_is_that_of_brute_force(seed, whole, limited):
    m = menu(seed, 4, 3, whole)
    limits = {"latency": m.least("latency") + 0.5 * m.span("latency")} if limited else {}
    assert close(reached(m, front(m, "kl", "energy", limits)), pareto(m, limits))


def test_whole_front_of_sixteen_sites_is_that_of_dynamic_programming():
    m = menu(3, 16, 5, whole=True)
    assert close(reached(m, front(m, "kl", "energy")), by_dynamic_programming(m))


def test_every_point_of_a_thinned_front_is_on_the_whole_one():
    m = menu(5, 16, 6)
    whole = by_dynamic_programming(m)
    found = reached(m, front(m, "kl", "energy", points=12))
    assert len(whole) > 100 and 5 < len(found) <= 13
    for point in found:
        assert np.isclose(whole, point, rtol=1e-7).all(axis=1).any(), point
    assert np.allclose(found[0], whole[0]) and np.allclose(found[-1], whole[-1]), "both ends are there"


@pytest.mark.parametrize("points", [None, 10])
def test_damage_falls_strictly_as_cost_rises_along_a_front(points):
    m = menu(7, 8, 4)
    found = reached(m, front(m, "kl", "energy", points=points))
    energies, damages = zip(*found, strict=True)
    assert (np.diff(energies) > 0).all() and (np.diff(damages) < 0).all()


def test_beaten_options_are_left_out_and_change_no_optimum():
    m = Menu(
        {"a": ("dense", "moe", "shift"), "b": ("dense", "same")},
        {"kl": (np.array([0.0, 1.0, 2.0]), np.zeros(2)), "energy": (np.array([5.0, 6.0, 3.0]), np.ones(2))},
        {"kl": 0.0, "energy": 0.0},
    )
    lean = m.useful(("kl", "energy"))
    assert lean.options == {"a": ("dense", "shift"), "b": ("dense",)}
    for seed in range(5):
        m = menu(seed, 5, 4)
        assert pareto(m) == pareto(m.useful(("kl", "energy"))), seed


def test_budgets_that_cannot_be_met_give_the_least_relative_excess():
    for seed in range(8):
        m = menu(seed, 4, 4)
        limits = {q: 0.9 * m.least(q) for q in ("energy", "latency")}
        assert least(m, ("kl",), limits) is None

        def excess(picks, m=m, limits=limits):
            return max((m.total(q, picks) - limit) / limit for q, limit in limits.items())

        assert excess(nearest(m, limits)) == pytest.approx(min(map(excess, every(m))), rel=1e-6)


def test_a_budget_equal_to_a_total_is_met():
    m = menu(11, 10, 4)
    dense = (0,) * 10
    assert least(m, ("kl",), {q: m.total(q, dense) for q in m.quantities}) is not None


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_do_not_matter(scale):
    m = menu(13, 8, 4)
    scaled = Menu(m.options, {q: tuple(scale * c for c in columns) for q, columns in m.costs.items()}, {q: scale * r for q, r in m.rest.items()})
    assert front(m, "kl", "energy", points=8) == front(scaled, "kl", "energy", points=8)


def test_what_is_not_known_or_not_finite_is_named():
    m = menu(0, 2, 2)
    with pytest.raises(UserError, match="unknown quantity 'area'.*energy"):
        least(m, ("kl",), {"area": 1.0})
    with pytest.raises(UserError, match="kl of a is not finite for 'shift'"):
        Menu({"a": ("dense", "shift")}, {"kl": (np.array([0.0, np.nan]),)}, {"kl": 0.0})
