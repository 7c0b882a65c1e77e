"""One HTML file: style, script, pictures and data inside, and a policy that lets nothing else run or load."""

import hashlib
import json
from base64 import b64encode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from shiftaddvit import __version__
from shiftaddvit.errors import UserError
from shiftaddvit.published import classification

from . import charted, maps, tables, tabulated
from .ablation import DESIGN, Comparison, comparisons
from .ablation import table as ablation_table
from .charts import Bars, Chart, Lines, Scatter
from .dispatched import DispatchResult
from .results import Results
from .svg import draw
from .tables import Cell, Table

MARK_WORDS = {
    "published": "published",
    "measured": "measured",
    "modelled": "modelled, not measured",
    "not run": "not run",
    "none": "no such number",
    "text": "",
}


@dataclass(frozen=True)
class Content:
    """Everything that the page and the files for papers are made of."""

    results: Results
    """As read."""
    comparisons: tuple[Comparison, ...]
    """Measured networks first."""
    ablations: tuple[Table, ...]
    """One for each comparison."""
    tradeoffs: tuple[Scatter, ...]
    """Measured, then published."""
    energy_totals: tuple[Bars, ...]
    """By recipe and level."""
    energy_layers: tuple[Bars, ...]
    """By part of the network and level."""
    shares: tuple[Bars, ...]
    """Tokens on shift, by mixture."""
    curves: tuple[Lines, ...]
    """Of training."""
    tables: tuple[Table, ...]
    """Sensitivity, view synthesis, speed: those that there are."""
    layer_tables: tuple[Table, ...] = field(default=())
    """Every operation's energy: for files alone."""

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All."""
        return (*self.tradeoffs, *self.energy_totals, *self.energy_layers, *self.shares, *self.curves)


def content(results: Results) -> Content:
    """Arrange what was read."""
    found = comparisons(results)
    measured = tuple(chart for number, one in enumerate(found) for chart in charted.measured_tradeoffs(one, number))
    energies = [energy for energy in results.energies if energy.layers]
    others = (tabulated.sensitivity_table(results), tabulated.view_table(results.views), tabulated.speed_table(results), tabulated.op_table(results))
    return Content(
        results, found, tuple(ablation_table(one, number) for number, one in enumerate(found)), measured + charted.published_tradeoffs(),
        charted.energy_totals(energies), tuple(charted.energy_by_layer(energy, number) for number, energy in enumerate(energies)),
        charted.share_charts(results), charted.curve_charts(results.curves), tuple(table for table in others if table is not None),
        tuple(tabulated.energy_table(energy, number) for number, energy in enumerate(energies)),
    )  # fmt: skip


def render(found: Content, title: str) -> str:
    """The page."""
    environment = _environment()
    style, script = (_template(name) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        title=title, c=found, tiles=tiles(found), style=style, script=script, policy=_policy(style, script), data=_data(found.results.dispatches),
        version=__version__, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), marks=tables.MARKS, mark_words=MARK_WORDS, stops=_stops(found),
        chart_table=chart_table,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """One number that stands for much."""

    number: str
    """Large."""
    text: str
    """What it is."""
    kind: str
    """Which of the four words it goes by."""


def tiles(found: Content) -> tuple[Tile, ...]:
    """At most four, from the first network that has a dense control and converted rows."""
    for one in found.comparisons:
        converted = [line for line in one.lines if line.runs and line.recipe != "dense"]
        if one.control is None or not converted:
            continue
        adding = {row.recipe for row in classification() if row.add}
        best = max([line for line in converted if line.recipe in adding] or converted, key=lambda line: line.top1)
        made = [
            Tile(f"{one.control.top1:.1f} %", f"of test images right with the dense model, on {one.subject.data}", "measured"),
            Tile(f"{best.top1:.1f} %", f"with the best row that adds instead of multiplying, {best.label}", "measured"),
        ]
        removed = [(run.removed, line.label) for line in converted for run in line.runs if run.removed is not None]
        if removed:
            made.append(Tile(f"{100 * max(removed)[0]:.0f} %", f"of the multiplications are gone in the row {max(removed)[1]}", "measured"))
        saved = [
            (1 - line.energy.mj_per_image / one.control.energy.mj_per_image, line.label) for line in converted if line.energy and one.control.energy
        ]
        if saved and max(saved)[0] > 0:
            made.append(
                Tile(
                    f"{100 * max(saved)[0]:.0f} %",
                    f"less energy than the dense model in the row {max(saved)[1]}, by the analytical model",
                    "modelled",
                )
            )
        return tuple(made)
    return ()


def chart_table(chart: Chart) -> Table:
    """A chart's values, for those who do not see it."""
    if isinstance(chart, Bars):
        columns = (tables.Column("", "", False), *(tables.Column(f"{part}, {chart.unit}") for part in chart.parts))
        rows = tuple((tables.words(label), *(Cell("text", f"{value:.4g}", value) for value in values)) for label, values in chart.rows)
    else:
        columns = (tables.Column("", "", False), tables.Column(chart.x_label), tables.Column(chart.y_label))
        rows = tuple(
            (
                tables.words(series.name if isinstance(chart, Lines) else point.label),
                Cell("text", f"{point.x:.4g}", point.x),
                Cell("text", f"{point.y:.4g}", point.y),
            )
            for series in chart.series
            for point in series.points
        )
    return Table(f"{chart.id}-values", chart.title, columns, rows)


def _stops(found: Content) -> list[tuple[str, str]]:
    """(anchor, words) of the sections that there are."""
    there = {
        "regions": bool(found.results.dispatches), "ablation": True, "tradeoffs": bool(found.tradeoffs), "energy": bool(found.energy_totals),
        "shares": bool(found.shares), "training": bool(found.curves), **{table.id: True for table in found.tables}, "files": True,
    }  # fmt: skip
    names = {
        "regions": "Image regions", "ablation": "Comparison", "tradeoffs": "Trade-offs", "energy": "Energy", "shares": "Shift share", "training": "Training",
        "sensitivity": "Sensitivity", "view-synthesis": "3D", "speed": "Speed", "ops": "Operations", "files": "Files",
    }  # fmt: skip
    return [(anchor, names[anchor]) for anchor, shown in there.items() if shown]


def _data(dispatches: list[DispatchResult]) -> str:
    """What the script needs to draw another layer, safe inside a script element."""
    value = [
        {
            "layers": [
                {
                    "label": ", ".join(maps.block_and_linear(m.name)),
                    "name": m.name,
                    "experts": m.experts,
                    "grid": m.grid,
                    "prefix": m.prefix,
                    "share": m.shift_share,
                }
                for m in one.mixtures
            ],
            "pictures": [[picture.experts[m.name] for m in one.mixtures] for picture in one.pictures],
        }
        for one in dispatches
    ]
    text = json.dumps(value, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(style: str, script: str) -> str:
    """Nothing but this page's own style and script, by their hashes, and pictures inside the page."""
    hashes = ["'sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in (style, script)]
    return f"default-src 'none'; img-src data:; style-src {hashes[0]}; script-src {hashes[1]}; base-uri 'none'; form-action 'none'"


def _template(name: str) -> str:
    return (resources.files("shiftaddvit.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Any:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise UserError("the report needs jinja2: install shiftaddvit[report]") from None
    environment = Environment(loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "svg": lambda chart: Markup(draw(chart)), "markdown": tables.as_markdown, "latex": tables.as_latex, "csv": tables.as_csv, "raw": Markup,
    }  # fmt: skip
    environment.globals |= {"design": DESIGN, "maps": maps, "level_names": tuple(charted.LEVEL_NAMES.values())}
    return environment
