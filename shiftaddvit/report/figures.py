"""The page's charts as SVG and PNG files for papers, drawn by matplotlib, and its tables as Markdown, LaTeX and CSV."""

from pathlib import Path
from types import ModuleType
from typing import Any

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .charts import Bars, Chart, Lines, Matrix, Point, Scatter, Series, front
from .contents import Content
from .dispatched import DispatchResult
from .labels import placed
from .maps import block_and_linear
from .tables import as_csv, as_latex, as_markdown

COLOURS = ("#1f5fbf", "#d1570a", "#1b7a43", "#8a3ea8", "#b3123f", "#0b7d8c", "#7a6200", "#4a4f58")
LEVEL_COLOURS = ("#b3423a", "#e08a2e", "#e3c75a", "#6fa8a0", "#35608f")
EXPERT_COLOURS = ("#e8730c", "#1f5fbf")
SHAPES = ("o", "s", "D", "^")
LOG_TICKS = tuple(m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5))
LABEL_POINTS = 6.5


def write_figures(found: Content, folder: Path) -> list[Path]:
    """Write every chart and table into `folder` and return the files. UserError where matplotlib is missing."""
    plt = _matplotlib()
    written = []
    for chart in found.charts:
        written += _save(_draw(chart, plt), folder / chart.id, plt)
    for number, one in enumerate(found.results.dispatches):
        if one.pictures and any(mixture.grid for mixture in one.mixtures):
            written += _save(_regions(one, plt), folder / f"regions-{number}", plt)
    for table in found.all_tables:
        for suffix, text in ((".md", as_markdown(table)), (".tex", as_latex(table)), (".csv", as_csv(table))):
            with atomic_write(folder / f"{table.id}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(folder / f"{table.id}{suffix}")
    return written


def _draw(chart: Chart, plt: ModuleType) -> Any:
    if isinstance(chart, Bars):
        return _bars(chart, plt)
    if isinstance(chart, Matrix):
        return _matrix(chart, plt)
    figure, axis = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    for index, series in enumerate(chart.series):
        if isinstance(chart, Lines):
            axis.plot(*_xy(series.points), color=COLOURS[index % len(COLOURS)], label=_safe(series.name), lw=1.4)
        else:
            _marks(axis, chart, series, index)
    if isinstance(chart, Scatter) and chart.log_x:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_xticks([tick for tick in LOG_TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]])
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(_safe(chart.x_label))
    axis.set_ylabel(_safe(chart.y_label))
    axis.set_title(_safe(chart.title), fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    if isinstance(chart, Scatter):
        _labels(figure, axis, chart)
    return figure


def _marks(axis: Any, chart: Scatter, series: Series, index: int) -> None:
    """As on the page: full marks are those that no other beats, hollow ones the rest."""
    colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)]
    best = front(series.points, chart.less_is_better) if series.joined else ()
    if best:
        axis.step(*_xy(best), where="post", color=colour, ls="--", lw=1, alpha=0.7)
    lows = [[point.y - point.low, point.high - point.y] if point.low is not None else [0, 0] for point in series.points]
    axis.errorbar(*_xy(series.points), yerr=list(zip(*lows, strict=True)), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
    fills = [colour if point in best else "white" for point in series.points]
    axis.scatter(*_xy(series.points), marker=shape, s=24, c=fills, edgecolors=colour, linewidths=1.1, label=_safe(series.name), zorder=3)


def _labels(figure: Any, axis: Any, chart: Scatter) -> None:
    """Labels where they cover nothing; a figure's pixels run upwards."""
    figure.draw_without_rendering()
    marks = [(point, series.labelled) for series in chart.series for point in series.points]
    spots = [
        (float(x), -float(y), point.label if shown else "") for (point, shown) in marks for x, y in [axis.transData.transform((point.x, point.y))]
    ]
    box, em = axis.get_window_extent(), 0.58 * LABEL_POINTS * figure.dpi / 72
    back = axis.transData.inverted()
    room = (box.x0, -box.y1 - 2 * em, float(figure.bbox.x1), -box.y0)
    for x, y, label in placed(spots, [spot[:2] for spot in spots], room, em):
        axis.annotate(_safe(label), back.transform((x, -y)), fontsize=LABEL_POINTS, annotation_clip=False)


def _xy(points: tuple[Point, ...]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.y for point in points]


def _bars(chart: Bars, plt: ModuleType) -> Any:
    figure, axis = plt.subplots(figsize=(6.5, 0.9 + 0.24 * len(chart.rows)), layout="constrained")
    left = [0.0] * len(chart.rows)
    names = [_safe(label) for label, _ in chart.rows]
    places = range(len(names))
    colours = EXPERT_COLOURS if len(chart.parts) == 2 else LEVEL_COLOURS
    for index, part in enumerate(chart.parts):
        widths = [values[index] for _, values in chart.rows]
        axis.barh(places, widths, left=left, color=colours[index % len(colours)], label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(chart.unit)
    axis.set_title(_safe(chart.title), fontsize=9)
    axis.legend(fontsize=7, frameon=False, ncols=len(chart.parts), loc="upper center", bbox_to_anchor=(0.45, -0.16 if len(names) < 12 else -0.07))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _matrix(chart: Matrix, plt: ModuleType) -> Any:
    """As on the page: colour and sign for the linear layers, a word for the attention."""
    columns, rows = len(chart.columns), len(chart.rows)
    figure, axis = plt.subplots(figsize=(1.6 + 0.78 * columns, 0.9 + 0.24 * rows), layout="constrained")
    for line, (_, squares) in enumerate(chart.rows):
        for number, square in enumerate(squares):
            left, right, top, bottom = number + 0.03, number + 0.97, line + 0.08, line + 0.92
            for kind, corners in (
                ("mult", [(left, top), (right, top), (left, bottom)]),
                ("shift", [(right, bottom), (right, top), (left, bottom)]),
            ):
                colour = EXPERT_COLOURS[("mult", "shift").index(kind if square.kind == "moe" else square.kind)]
                axis.add_patch(plt.Polygon(corners, facecolor=colour, alpha=0.35, edgecolor="none", lw=0))
            axis.text(number + 0.5, line + 0.52, square.text, ha="center", va="center", fontsize=6)
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    axis.set_xticks([number + 0.5 for number in range(columns)], [_safe(name.replace("-", "-\n")) for name in chart.columns], fontsize=6)
    axis.set_yticks([line + 0.5 for line in range(rows)], [_safe(label) for label, _ in chart.rows], fontsize=6)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(_safe(f"{chart.title}: × multiplies, ≪ shifts, both: token by token"), fontsize=8)
    return figure


def _regions(found: DispatchResult, plt: ModuleType) -> Any:
    """Pictures down, layers across: at most four and six, the layers spread over the depth of the network."""
    from matplotlib.colors import ListedColormap

    drawn = [mixture for mixture in found.mixtures if mixture.grid]
    layers = [drawn[number * len(drawn) // min(6, len(drawn))] for number in range(min(6, len(drawn)))]
    pictures = found.pictures[:4]
    figure, axes = plt.subplots(
        len(pictures), len(layers) + 1, figsize=(1.25 * (len(layers) + 1), 1.35 * len(pictures)), layout="constrained", squeeze=False
    )
    for row, picture in zip(axes, pictures, strict=True):
        image = _image(picture.image)
        for axis, mixture in zip(row, [None, *layers], strict=True):
            axis.imshow(image, extent=(0, 1, 1, 0))
            axis.set_axis_off()
            if mixture is not None:
                rows, columns = mixture.grid
                digits = picture.experts[mixture.name][mixture.prefix :]
                shift = [[mixture.experts[int(digits[r * columns + c])] == "shift" for c in range(columns)] for r in range(rows)]
                axis.imshow(shift, extent=(0, 1, 1, 0), cmap=ListedColormap(EXPERT_COLOURS), vmin=0, vmax=1, alpha=0.6, interpolation="nearest")
            if row is axes[0]:
                axis.set_title("image" if mixture is None else _safe(",\n".join(block_and_linear(mixture.name))), fontsize=6)
    figure.suptitle(_safe(f"{found.title}: orange multiplies, blue shifts"), fontsize=8)
    return figure


def _image(uri: str) -> Any:
    import io
    from base64 import b64decode

    import numpy as np
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))).convert("RGB"))
    except OSError as error:
        raise UserError(f"a picture of a dispatch file cannot be read: {error}") from None


def _safe(text: str) -> str:
    """Dollar signs would be mathematics to matplotlib."""
    return text.replace("$", r"\$")


def _save(figure: Any, path: Path, plt: ModuleType) -> list[Path]:
    written = []
    for suffix in (".svg", ".png"):
        target = path.with_suffix(suffix)
        with atomic_write(target) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=200, bbox_inches="tight")
        written.append(target)
    plt.close(figure)
    return written


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: install shiftaddvit[report]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
