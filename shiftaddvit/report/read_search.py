"""Readers of what a search writes: the answer with its front, and the measured time of every option."""

import math
import re
from itertools import pairwise

from shiftaddvit.search_terms import COSTS, DAMAGES, DENSE, UNITS, change_of

from .fields import Fields
from .networks import ModelRef, image_size, model_ref
from .results import Results
from .searched import SearchLatency, SearchPoint, SearchResult, SiteValues, Together, parts
from .sources import Source

_BUDGET = re.compile(r"(energy|latency|kl|loss|drop) ≤ (\d[\d.]*(?:e[-+]?\d+)?) (of dense|mJ|µs|nats|points)\Z")
MOST = 1e12
"""Of any quantity: more mJ, µs or nats are a mistake."""
ROUNDED = 1e-5
"""Budgets are written with six digits: what is nearer than this to one may be on either side of it."""


def read_search(values: Fields, source: Source, found: Results) -> None:
    """One search: its points must be of one network, its front a front, its answer what the recipe says and the budgets allow."""
    sites = _sites(values)
    damage, cost = _one_of(values, "damage", DAMAGES), _one_of(values, "cost", COSTS)
    dense = _point(values.fields("dense"), sites)
    if dense.choice or any(dense.totals[quantity] for quantity in DAMAGES):
        values.fail("'dense' must change nothing and harm nothing")
    units = values.fields("units")
    for quantity in dense.totals:
        if units.text(quantity) != UNITS[quantity]:
            values.fail(f"units.{quantity} must be {UNITS[quantity]}, is {units.text(quantity)}")
    if cost not in dense.totals:
        values.fail(f"'cost' is {cost}, of which the totals say nothing")
    answer = _point(values.fields("found"), sites)
    front = tuple(_point(entry, sites) for entry in values.each("front"))
    named = values.fields("rows")
    rows = {name: _point(named.fields(name), sites) for name in named.values}
    _check_points(values, [dense, answer, *front, *rows.values()])
    _check_front(values, front, damage, cost)
    _check_recipe(values.fields("recipe"), answer)
    met, budgets = _met(values, answer, dense)
    tables = values.fields("tables")
    measured = tables.fields("sensitivity") if "sensitivity" in tables else Fields({})
    size = image_size(tables.fields("energy").values.get("image_size")) if "energy" in tables else None
    model = model_ref(values, size) if "model" in values else ModelRef("unnamed network", "", size)
    found.searches.append(
        SearchResult(
            model, _in_order(values, sites), budgets, met, _one_of(values, "minimised", tuple(UNITS)), damage, cost, answer, dense, front, rows,
            _site_values(values, sites, answer, dense), _together(values), measured.count("images", 1) if "images" in measured else None,
            ", ".join(filter(None, (values.word("data"), values.word("split")))), source,
        )
    )  # fmt: skip


def read_search_latency(values: Fields, source: Source, found: Results) -> None:
    """Time by layer and option: every layer has its dense form, and every time is above zero."""
    if values.text("quantity") != "latency" or values.text("unit") != UNITS["latency"]:
        values.fail(f"holds {values.text('quantity')} in {values.text('unit')}, not latency in {UNITS['latency']}")
    sites, costs, conditions = _sites(values), values.fields("costs"), values.fields("conditions")
    conditions.text("device")
    if set(costs.values) != set(sites):
        values.fail("'costs' and 'identity' name other layers")
    times = {site: costs.by_name(site, 0, MOST) for site in costs.values}
    for site, options in times.items():
        if DENSE not in options:
            values.fail(f"costs.{site} lacks the dense form")
        for option, time in options.items():
            if parts(option) is None or time == 0:
                values.fail(f"costs.{site}.{option} is no option that a search times" if time else f"costs.{site}.{option} is 0")
    found.search_latencies.append(SearchLatency(times, values.number("rest", 0, MOST), source))


def _sites(values: Fields) -> tuple[str, ...]:
    """Names of attentions and MLPs, each once."""
    entries = values.fields("identity").list("sites")
    if not entries or not all(isinstance(entry, str) and entry for entry in entries) or len(set(entries)) != len(entries):
        values.fail("identity.sites must be texts, each once")
    return tuple(entry.partition(" (")[0] for entry in entries)


def _in_order(values: Fields, sites: tuple[str, ...]) -> tuple[str, ...]:
    if "sites" in values:
        return tuple(entry.text("name") for entry in values.each("sites"))
    return tuple(sorted(sites, key=lambda site: [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in site.split(".")]))


def _one_of(values: Fields, key: str, allowed: tuple[str, ...]) -> str:
    value = values.text(key)
    if value not in allowed:
        values.fail(f"{key!r} must be one of {', '.join(allowed)}, is {value[:40]!r}")
    return value


def _point(entry: Fields, sites: tuple[str, ...]) -> SearchPoint:
    totals, chosen = entry.by_name("totals", 0, MOST), entry.fields("choice")
    if not set(totals) <= UNITS.keys() or not set(DAMAGES) <= totals.keys() or not totals.keys() & set(COSTS):
        entry.fail(f"'totals' must have {', '.join(DAMAGES)} and energy or latency, has {', '.join(totals)[:80]}")
    if any(totals[cost] == 0 for cost in totals.keys() & set(COSTS)):
        entry.fail("a network that costs nothing")
    choice = {site: chosen.text(site) for site in chosen.values}
    for site, option in choice.items():
        if site not in sites:
            entry.fail(f"{site!r} is none of the network's attentions and MLPs")
        if option == DENSE or parts(option) is None:
            entry.fail(f"{option[:40]!r} at {site} is no option of a search")
    return SearchPoint(choice, totals)


def _check_points(values: Fields, points: list[SearchPoint]) -> None:
    """One network: the same quantities everywhere, no layer both attention and MLP, and equal choices with equal totals."""
    known: dict[tuple, SearchPoint] = {}
    kinds: dict[str, bool] = {}
    for point in points:
        if point.totals.keys() != points[0].totals.keys():
            values.fail("some points say more quantities than others")
        for site, option in point.choice.items():
            if kinds.setdefault(site, option.startswith("mlp-")) != option.startswith("mlp-"):
                values.fail(f"{site} takes options of an attention and of an MLP")
        twin = known.setdefault(tuple(sorted(point.choice.items())), point)
        for quantity, total in point.totals.items():
            values.agree(f"total {quantity} of a choice that is there twice", total, twin.totals[quantity])


def _check_front(values: Fields, front: tuple[SearchPoint, ...], damage: str, cost: str) -> None:
    if not front:
        values.fail("'front' has no points")
    for number, (dearer, cheaper) in enumerate(pairwise(front)):
        if not (cheaper.totals[cost] < dearer.totals[cost] and cheaper.totals[damage] >= dearer.totals[damage]):
            values.fail(f"front[{number + 1}] does not trade {cost} for {damage}: the front must fall in {cost} and rise in {damage}")


def _check_recipe(recipe: Fields, answer: SearchPoint) -> None:
    if set(recipe.values) & {"attention", "add", "attn_linear", "mlp", "rest"}:
        recipe.fail("changes more than the layers that it names")
    made = {}
    for entry in recipe.each("overrides") if "overrides" in recipe else ():
        made[entry.text("modules")] = {key: entry.text(key) for key in entry.values if key != "modules"}
    if made != {site: change_of(option) for site, option in answer.choice.items()}:
        recipe.fail("its overrides are not the choice that 'found' has")


def _met(values: Fields, answer: SearchPoint, dense: SearchPoint) -> tuple[bool, tuple[str, ...]]:
    """Whether the file says that the budgets are met, as the totals must agree."""
    met, budgets = values.values.get("met"), values.list("budgets")
    if not isinstance(met, bool):
        values.fail("'met' must be true or false")
    over, near = [], False
    for number, text in enumerate(budgets):
        match = _BUDGET.match(text) if isinstance(text, str) else None
        if match is None or match[1] not in dense.totals or match[3] not in ("of dense", UNITS[match[1]]):
            values.fail(f"budgets[{number}] is no budget of this search")
        limit = float(match[2]) * (dense.totals[match[1]] if match[3] == "of dense" else 1.0)
        if math.isclose(answer.totals[match[1]], limit, rel_tol=ROUNDED, abs_tol=1e-9):
            near = True
        elif answer.totals[match[1]] > limit:
            over.append(text)
    if met and over:
        values.fail(f"says that the budgets are met, but 'found' is over {over[0]}")
    if not (met or over or near):
        values.fail("says that the budgets cannot be met, but 'found' meets them")
    return met, tuple(budgets)


def _site_values(values: Fields, sites: tuple[str, ...], answer: SearchPoint, dense: SearchPoint) -> dict[str, SiteValues]:
    """What each layer costs and harms: they and the rest must add up to the totals."""
    if "sites" not in values:
        return {}
    rest = values.fields("rest")
    found: dict[str, SiteValues] = {}
    for entry in values.each("sites"):
        name = entry.text("name")
        if entry.text("becomes") != answer.option(name):
            entry.fail(f"says that {name} becomes {entry.text('becomes')[:40]!r}, 'found' says {answer.option(name)!r}")
        here, was = entry.by_name("here", 0, MOST), entry.by_name("dense", 0, MOST)
        if here.keys() != dense.totals.keys() or was.keys() != {cost for cost in COSTS if cost in dense.totals}:
            entry.fail("must say every quantity here, and every cost as it was")
        found[name] = SiteValues(here, was)
    if len(found) != len(values.list("sites")) or found.keys() != set(sites):
        values.fail("'sites' and 'identity' name other layers")
    for quantity, total in answer.totals.items():
        outside = rest.number(quantity, 0, MOST) if quantity in COSTS else 0.0
        values.agree(f"found.totals.{quantity}", total, outside + sum(one.here[quantity] for one in found.values()))
        if quantity in COSTS:
            values.agree(f"dense.totals.{quantity}", dense.totals[quantity], outside + sum(one.dense[quantity] for one in found.values()))
    return found


def _together(values: Fields) -> Together | None:
    if "together" not in values:
        return None
    entry = values.fields("together")
    interval, drop = entry.pair("interval95", -100, 100), entry.number("drop", -100, 100)
    if not interval[0] <= drop <= interval[1]:
        entry.fail("'interval95' must be two numbers with 'drop' between them")
    return Together(entry.number("top1", 0, 100), drop, interval, entry.number("kl", -1e-6, MOST), entry.number("loss", -MOST, MOST))
