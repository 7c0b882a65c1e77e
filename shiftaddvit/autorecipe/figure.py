"""The front as a picture, as SVG and PNG. matplotlib is an optional extra."""

from pathlib import Path
from types import ModuleType

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write
from shiftaddvit.search_terms import UNITS

from .result import Found

_FRONT, _ROWS, _FOUND = "#33567f", "#c8553d", "#2a7f62"


def front_figure(found: Found, path: str | Path) -> list[Path]:
    """Damage over cost: the front, the shipped recipes, the dense network and what was found. Writes `path` as .svg and as .png and
    returns both. UserError without matplotlib."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    axis.plot(*_xy(found, found.front), color=_FRONT, marker="o", markersize=3.5, linewidth=1, drawstyle="steps-pre", label="front")
    # Recipes of one position share a label.
    labels: dict[tuple[float, float], list[str]] = {}
    for name, point in (*found.rows.items(), ("dense", found.dense)):
        labels.setdefault(_position(found, point), []).append(name)
    axis.scatter(*zip(*labels, strict=True), marker="s", s=22, color=_ROWS, label="shipped recipes", zorder=3)
    for position, names in labels.items():
        axis.annotate(", ".join(names), position, xytext=(5, 4), textcoords="offset points", fontsize=7, color=_ROWS)
    axis.scatter(*_xy(found, [found.point]), marker="*", s=140, color=_FOUND, label="found" if found.met else "nearest", zorder=4)
    for budget in found.budgets:
        if budget.quantity == found.cost:
            axis.axvline(budget.absolute(found.dense.totals[found.cost]), color=_FOUND, linewidth=0.8, linestyle="--")
        elif budget.quantity == found.damage:
            axis.axhline(budget.absolute(0.0), color=_FOUND, linewidth=0.8, linestyle="--")
    axis.set_xlabel(f"{found.cost} [{UNITS[found.cost]}]")
    axis.set_ylabel(f"{found.damage} [{UNITS[found.damage]}], sum over sites, before fine-tuning")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.08)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    written = []
    for suffix in (".svg", ".png"):
        target = Path(path).with_suffix(suffix)
        with atomic_write(target) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=160)
        written.append(target)
    plt.close(figure)
    return written


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a screen. UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: install shiftaddvit[search], or leave the figure out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _position(found: Found, point) -> tuple[float, float]:
    return point.totals[found.cost], point.totals[found.damage]


def _xy(found: Found, points) -> tuple[list[float], list[float]]:
    xs, ys = zip(*(_position(found, point) for point in points), strict=True)
    return list(xs), list(ys)
