"""One HTML file: style, script, pictures and data inside, and a policy that lets nothing else run or load."""

import hashlib
import json
from base64 import b64encode
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from shiftaddvit import __version__
from shiftaddvit.errors import UserError

from . import charted, maps, tables
from .ablation import DESIGN
from .charts import Bars, Chart, Lines, Matrix, Scatter
from .contents import Content, tiles
from .dispatched import DispatchResult
from .sections import SECTIONS, stops
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


def render(found: Content, title: str) -> str:
    """The page."""
    environment = _environment()
    style, script = (_template(name) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        title=title, c=found, tiles=tiles(found), style=style, script=script, policy=_policy(style, script), data=_data(found.results.dispatches),
        version=__version__, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), marks=tables.MARKS, mark_words=MARK_WORDS, stops=stops(found),
        chart_table=chart_table, series_of=series_of, sections=SECTIONS,
    )  # fmt: skip


def series_of(chart: Scatter | Lines) -> list[tuple[str, str]]:
    """(class, name) of each series, for the legend."""
    return [(f"s{index % 8}", series.name) for index, series in enumerate(chart.series)]


def chart_table(chart: Chart) -> Table:
    """A chart's values, for those who do not see it."""
    if isinstance(chart, Bars):
        columns = (tables.Column("", "", False), *(tables.Column(f"{part}, {chart.unit}") for part in chart.parts))
        rows = tuple((tables.words(label), *(Cell("text", f"{value:.4g}", value) for value in values)) for label, values in chart.rows)
    elif isinstance(chart, Matrix):
        columns = (tables.Column("layer", "", False), *(tables.Column(name, "", False) for name in chart.columns))
        rows = tuple((tables.words(label), *(tables.words(square.text, square.detail) for square in squares)) for label, squares in chart.rows)
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
    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )  # fmt: skip
    environment.filters |= {
        "svg": lambda chart: Markup(draw(chart)), "markdown": tables.as_markdown, "latex": tables.as_latex, "csv": tables.as_csv, "raw": Markup,
    }  # fmt: skip
    environment.globals |= {"design": DESIGN, "maps": maps, "level_names": tuple(charted.LEVEL_NAMES.values())}
    return environment
