"""From a search to its charts, tables and the numbers that sum it up."""

from dataclasses import dataclass

from shiftaddvit.search_terms import COSTS, DAMAGES, DENSE, UNITS

from .charts import Matrix, Point, Scatter, Series, Square
from .maps import in_words
from .results import Results
from .searched import SearchLatency, SearchPoint, SearchResult, parts
from .tables import NONE, NOT_RUN, Cell, Column, Table, Tile, signed, words

FORMS = {"msa": "softmax", "linear": "linear", "add": "add", "hash": "hash"}
"""The form of an attention, for a square."""
SIGNS = {"mult": "×", "shift": "≪", "moe": "× ≪"}
"""Who computes its linear layers: multiplications, shifts, or for each token one of both."""
LINEARS = {"mult": "linear layers multiply", "shift": "linear layers shift", "moe": "each token's linear layers multiply or shift"}
SHORT = {"kl": "KL, nats", "loss": "loss, nats", "drop": "accuracy, points"}
"""In a heading."""
TOLD = {
    "kl": "how far the class probabilities are from the dense model's: 0 is the same answer",
    "loss": "how much the cross-entropy rises",
    "drop": "how much the accuracy falls: points are percent of all images",
}
"""Under it."""
DAMAGE_NAMES = {"kl": "KL divergence", "loss": "rise of the loss", "drop": "accuracy loss"}
"""In a sentence."""


@dataclass(frozen=True)
class ShownSearch:
    """One search as the page shows it."""

    result: SearchResult
    """As read."""
    title: str
    """The network and what was asked."""
    tiles: tuple[Tile, ...]
    """Its answer in numbers."""
    charts: tuple[Scatter, ...]
    """The front, and the accuracy where the front trades something else."""
    matrix: Matrix
    """What each layer becomes."""
    points: Table
    """The answer, the dense network and the shipped recipes."""
    layers: Table
    """Layer by layer, the shipped recipes beside it."""
    front: Table
    """Every point of the front."""


def shown_search(found: SearchResult, number: int) -> ShownSearch:
    """Everything of one search."""
    asked = f"least {_name(found.minimised)} under {', '.join(found.budgets)}" if found.budgets else f"least {_name(found.minimised)}, no budget"
    charts = [_scatter(found, number, found.damage)]
    if found.damage != "drop":
        charts.append(_scatter(found, number, "drop"))
    return ShownSearch(
        found, f"{found.model.sized}: {asked}", _search_tiles(found), tuple(charts), _matrix(found, number), _points(found, number),
        _layers(found, number), _front(found, number),
    )  # fmt: skip


def search_latency_tables(results: Results) -> tuple[Table, ...]:
    """The measured times that searches with a latency took."""
    return tuple(_latencies(found, number) for number, found in enumerate(results.search_latencies))


def option_words(option: str) -> str:
    """An option as words."""
    if option == DENSE:
        return "as it is"
    form, linears = parts(option)
    shown = {"mult": "", "shift": "shift", "moe": "mixture"}[linears]
    return " + ".join(filter(None, (FORMS.get(form, ""), shown)))


def _name(quantity: str) -> str:
    return DAMAGE_NAMES.get(quantity, quantity)


def _search_tiles(found: SearchResult) -> tuple[Tile, ...]:
    lines = []
    for cost in (q for q in found.quantities if q in COSTS):
        here, dense = found.found.totals[cost], found.dense.totals[cost]
        how = "summed over its layers, each timed alone" if cost == "latency" else "by the analytical model"
        lines.append(
            Tile(f"{100 * here / dense:.1f} %", f"of the dense model's {cost}: {here:.4g} {UNITS[cost]} instead of {dense:.4g}, {how}", "modelled")
        )
    lines.append(Tile(signed(-found.found.totals["drop"]), "points of accuracy by prediction: what each change alone costs, added up", "modelled"))
    if found.together is not None:
        low, high = found.together.interval95
        text = f"points of accuracy with all changes together, before fine-tuning (95 % interval {signed(-high)} … {signed(-low)})"
        lines.append(Tile(signed(-found.together.drop), text, "measured"))
    lines.append(Tile(f"{len(found.found.choice)} of {len(found.sites)}", "attentions and MLPs become something else", ""))
    return tuple(lines)


def _scatter(found: SearchResult, number: int, damage: str) -> Scatter:
    """Damage over cost: the front, the shipped recipes, the answer, and the answer as it was measured."""
    answer = "found" if found.met else "nearest"

    def point(one: SearchPoint, label: str) -> Point:
        x, y = one.totals[found.cost], one.totals[damage]
        share = 100 * x / found.dense.totals[found.cost]
        return Point(
            x, y, label, f"{found.cost} {x:.4g} {UNITS[found.cost]} ({share:.1f} % of dense), {_name(damage)} {y:.4g} {UNITS[damage]}, predicted"
        )

    series = [
        Series("Pareto front" if damage == found.damage else "the same choices", tuple(point(p, f"point {i}") for i, p in enumerate(found.front, 1)),
               damage == found.damage, False),
        Series("as it was, and shipped recipes", (point(found.dense, DENSE), *(point(p, name) for name, p in found.rows.items())), False),
        Series(answer, (point(found.found, answer),)),
    ]  # fmt: skip
    if found.together is not None:
        y, x = getattr(found.together, damage), found.found.totals[found.cost]
        low, high = found.together.interval95 if damage == "drop" else (None, None)
        spread = "" if low is None else f" (95 % interval {signed(low)} … {signed(high)})"
        series.append(
            Series(f"{answer}, measured as a whole", (Point(x, y, "measured", f"{_name(damage)} {y:.4g} {UNITS[damage]}{spread}", low, high),))
        )
    sources = ("modelled", "measured") if found.together is not None else ("modelled",)
    where = f" on {found.images:,} images" if found.images else ""
    name = "front" if damage == found.damage else "accuracy"
    return Scatter(
        f"search-{number}-{name}", f"{_name(damage)[0].upper()}{_name(damage)[1:]} against {found.cost}",
        f"{found.cost}, {UNITS[found.cost]}", f"{_name(damage)}, {UNITS[damage]}", sources, tuple(series),
        f"before fine-tuning{where}; predicted: a sum over layers, each changed alone", less_is_better=True,
    )  # fmt: skip


def _by_cost(found: SearchResult) -> list[tuple[str, SearchPoint]]:
    return sorted(found.rows.items(), key=lambda entry: entry[1].totals[found.cost])


def _matrix(found: SearchResult, number: int) -> Matrix:
    columns = [("found" if found.met else "nearest", found.found), *_by_cost(found)]
    rows = []
    for site in found.sites:
        squares = []
        for name, point in columns:
            form, linears = parts(point.option(site))
            text = f"{FORMS[form]} {SIGNS[linears]}" if form else SIGNS[linears]
            told = f"{FORMS[form]} attention, {LINEARS[linears]}" if form else LINEARS[linears]
            squares.append(Square(text, linears, f"{in_words(site)} in {name}: {'as it is' if point.option(site) == DENSE else told}"))
        rows.append((in_words(site), tuple(squares)))
    about = "the answer first, then the shipped recipes from the cheapest on"
    return Matrix(f"search-{number}-choice", "What each layer becomes", tuple(name for name, _ in columns), tuple(rows), about)


def _quantity_columns(found: SearchResult) -> list[Column]:
    columns = []
    for quantity in found.quantities:
        if quantity in COSTS:
            group = f"{quantity}, {'modelled' if quantity == 'energy' else 'summed'}"
            columns += [Column(UNITS[quantity], group, better="lower"), Column("of dense, %", group, better="lower")]
        else:
            columns.append(Column(SHORT[quantity], "harm, predicted", better="lower", note=TOLD[quantity]))
    return columns


def _quantities(found: SearchResult, point: SearchPoint) -> list[Cell]:
    cells = []
    for quantity in found.quantities:
        value = point.totals[quantity]
        note = {"energy": "analytical model", "latency": "sum over steps, each timed alone"}.get(quantity, "sum over layers, each changed alone")
        cells.append(Cell("modelled", _shown(quantity, value), value, note))
        if quantity in COSTS:
            share = 100 * value / found.dense.totals[quantity]
            cells.append(Cell("modelled", f"{share:.1f}", share))
    return cells


def _shown(quantity: str, value: float) -> str:
    """Three digits; points with two decimals, as accuracies have them."""
    text = f"{value:.2f}" if quantity == "drop" or value == 0 else f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return text.replace("-", "−")


def _changed(found: SearchResult, point: SearchPoint) -> Cell:
    return Cell("text", f"{len(point.choice)} of {len(found.sites)}", len(point.choice))


def _points(found: SearchResult, number: int) -> Table:
    together = found.together
    columns = [Column("choice", "", False), *_quantity_columns(found)]
    if together is not None:
        columns += [Column(SHORT[quantity], "harm, measured", better="lower", note=TOLD[quantity]) for quantity in DAMAGES]
    columns.append(Column("layers changed"))
    answer = words("▸ found" if found.met else "▸ nearest to the budget", "the answer of the search")
    rows = []
    entries = [(answer, found.found), *((words(name, "shipped recipe") if name != DENSE else words("dense, as it was"), p) for name, p in
                                        sorted([*found.rows.items(), (DENSE, found.dense)], key=lambda e: e[1].totals[found.cost]))]  # fmt: skip
    for label, point in entries:
        row = [label, *_quantities(found, point)]
        if together is not None:
            row += [_measured(found, quantity) if label is answer else NONE if point is found.dense else NOT_RUN for quantity in DAMAGES]
        rows.append((*row, _changed(found, point)))
    return Table(f"search-{number}", "What the search found, beside the shipped recipes", tuple(columns), tuple(rows), _notes(found))


def _measured(found: SearchResult, quantity: str) -> Cell:
    value = getattr(found.together, quantity)
    note = ""
    if quantity == "drop":
        low, high = found.together.interval95
        note = f"paired 95 % interval {signed(low)} … {signed(high)}, top-1 {found.together.top1:.2f} %"
    return Cell("measured", _shown(quantity, value), value, note)


def _notes(found: SearchResult) -> tuple[str, ...]:
    images = f"{found.images:,} images" if found.images else "images"
    where = f" ({found.where})" if found.where else ""
    return (
        f"Harm is predicted by changing one layer at a time without training, on {images}{where}, and adding up; fine-tuning comes after and repairs "
        "much of it. KL divergence says how far the class probabilities are from the dense model's, in nats: 0 is the same answer.",
        "Cost is computed, not measured: energy by the analytical model"
        + (", latency as the sum of the engine's steps." if "latency" in found.quantities else "."),
    )


def _layers(found: SearchResult, number: int) -> Table:
    others = _by_cost(found)
    columns = [Column("layer", "", False), Column("becomes", "found", False)]
    quantities = found.quantities if found.values else ()
    for quantity in quantities:
        if quantity in COSTS:
            columns.append(Column(f"{quantity}, {UNITS[quantity]}", "found", better="lower"))
            columns.append(Column(f"{quantity} of dense, %", "found", better="lower", note="of what this layer took as it was"))
        elif quantity == found.damage:
            columns.append(Column(SHORT[quantity], "found", better="lower", note=TOLD[quantity]))
    columns += [Column(name, "shipped recipes", False) for name, _ in others]
    rows = []
    for site in found.sites:
        row = [words(in_words(site), site), words(option_words(found.found.option(site)))]
        for quantity in quantities:
            here = found.values[site].here[quantity]
            if quantity in COSTS:
                was = found.values[site].dense[quantity]
                row += [
                    Cell("modelled", _shown(quantity, here), here),
                    Cell("modelled", f"{100 * here / was:.0f}", 100 * here / was) if was else NONE,
                ]
            elif quantity == found.damage:
                row.append(Cell("modelled", _shown(quantity, here), here, "this layer changed alone"))
        rows.append((*row, *(words(option_words(point.option(site))) for _, point in others)))
    return Table(f"search-{number}-layers", "What each layer becomes", tuple(columns), tuple(rows))


def _front(found: SearchResult, number: int) -> Table:
    columns = (Column("point"), *_quantity_columns(found), Column("layers changed"))
    rows = tuple(
        (Cell("text", str(place), place), *_quantities(found, point), _changed(found, point)) for place, point in enumerate(found.front, start=1)
    )
    return Table(f"search-{number}-front-points", f"Every point of the front: {_name(found.damage)} against {found.cost}", columns, rows)


def _latencies(found: SearchLatency, number: int) -> Table:
    conditions = found.source.conditions
    by_words = {site: {option_words(option): time for option, time in values.items()} for site, values in found.costs.items()}
    options = list(dict.fromkeys(option for values in by_words.values() for option in values))
    columns = (Column("layer", "", False), *(Column(option, "µs, measured here", better="lower") for option in options))
    rows = [
        (words(in_words(site), site), *(Cell("measured", f"{values[o]:.1f}", values[o]) if o in values else NONE for o in options))
        for site, values in by_words.items()
    ]
    everything_else = Cell("measured", f"{found.rest:.1f}", found.rest, "outside attentions and MLPs, the same under every option")
    rows.append((words("everything else"), *(everything_else if option == option_words(DENSE) else NONE for option in options)))
    batch = conditions.get("batch")
    notes = (
        f"Measured on {conditions['device']}" + (f", batch {batch}" if batch else "") + ", each step of the engine alone, median. A whole engine "
        "overlaps steps, so sums are no forecast of its latency; routers are untrained.",
    )
    return Table(f"search-latency-{number}", "Time of every option, layer by layer", columns, tuple(rows), notes)
