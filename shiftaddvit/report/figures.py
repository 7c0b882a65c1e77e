"""The page's charts as SVG and PNG files for papers, drawn by matplotlib, and its tables as Markdown, LaTeX and CSV."""

from pathlib import Path
from types import ModuleType
from typing import Any

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .charts import Bars, Chart, Lines, Scatter, front
from .dispatched import DispatchResult
from .maps import block_and_linear
from .page import Content
from .tables import as_csv, as_latex, as_markdown

COLOURS = ("#1f5fbf", "#d1570a", "#1b7a43", "#8a3ea8", "#b3123f", "#0b7d8c", "#7a6200", "#4a4f58")
LEVEL_COLOURS = ("#b3423a", "#e08a2e", "#e3c75a", "#6fa8a0", "#35608f")
EXPERT_COLOURS = ("#e8730c", "#1f5fbf")
SHAPES = ("o", "s", "D", "^")


def write_figures(found: Content, folder: Path) -> list[Path]:
    """Write every chart and table into `folder` and return the files. UserError where matplotlib is missing."""
    plt = _matplotlib()
    written = []
    for chart in found.charts:
        written += _save(_draw(chart, plt), folder / chart.id, plt)
    for number, one in enumerate(found.results.dispatches):
        if one.pictures and any(mixture.grid for mixture in one.mixtures):
            written += _save(_regions(one, plt), folder / f"regions-{number}", plt)
    for table in (*found.ablations, *found.tables, *found.layer_tables):
        for suffix, text in ((".md", as_markdown(table)), (".tex", as_latex(table)), (".csv", as_csv(table))):
            with atomic_write(folder / f"{table.id}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(folder / f"{table.id}{suffix}")
    return written


def _draw(chart: Chart, plt: ModuleType) -> Any:
    if isinstance(chart, Bars):
        return _bars(chart, plt)
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for index, series in enumerate(chart.series):
        colour, xs, ys = COLOURS[index % len(COLOURS)], [point.x for point in series.points], [point.y for point in series.points]
        if isinstance(chart, Lines):
            axis.plot(xs, ys, color=colour, label=_safe(series.name), lw=1.4)
            continue
        best = front(series.points)
        axis.step([point.x for point in best], [point.y for point in best], where="post", color=colour, ls="--", lw=1, alpha=0.7)
        lows = [[point.y - point.low, point.high - point.y] if point.low is not None else [0, 0] for point in series.points]
        axis.errorbar(xs, ys, yerr=list(zip(*lows, strict=True)), fmt=SHAPES[index % 4], color=colour, ms=5, elinewidth=0.8, label=_safe(series.name))
        for point in series.points:
            axis.annotate(_safe(point.label), (point.x, point.y), xytext=(5, 3), textcoords="offset points", fontsize=6.5)
    if isinstance(chart, Scatter) and chart.log_x:
        axis.set_xscale("log")
    axis.set_xlabel(_safe(chart.x_label))
    axis.set_ylabel(_safe(chart.y_label))
    axis.set_title(_safe(chart.title), fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


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
