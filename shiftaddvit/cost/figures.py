"""Energies as pictures, each as SVG and PNG. matplotlib is an optional extra."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write

from .result import LEVELS, Energy
from .whatif import Sweep

FORMATS = (".svg", ".png")
_LEVEL_NAMES = {"dram": "DRAM", "buffer": "global buffer", "noc": "network on chip", "rf": "register files", "compute": "arithmetic"}
_LEVEL_COLOURS = ("#33567f", "#5b8db8", "#9cc3d5", "#e3b04b", "#c8553d")
_KIND_COLOURS = {
    "linear (mult)": "#7a4988", "conv (mult)": "#a678b4", "product (mult)": "#d0b3d9", "linear (shift)": "#2a7f62", "product (add)": "#7cc0a0",
    "linear (adder)": "#b5c95a", "conv (adder)": "#d5e08f", "router": "#d98032", "dispatch": "#f0b67f", "softmax": "#4f5d75",
    "norm": "#7d8597", "elementwise": "#a5acb8", "reduction": "#c3c8d0", "pointwise": "#dde0e5", "move": "#6b705c", "other": "#eceef1",
}  # fmt: skip


def bar_figure(energies: Mapping[str, Energy], path: str | Path) -> list[Path]:
    """Stacked bars, by memory level on the left and by kind of layer on the right, one bar for each entry. Writes `path` as .svg and as
    .png and returns both; UserError without matplotlib."""
    plt = _matplotlib()
    names = list(energies)
    by_level = {name: {_LEVEL_NAMES[k]: v for k, v in energy.by_level().items()} for name, energy in energies.items()}
    by_kind = {name: {k: sum(v.values()) for k, v in energy.by_kind().items()} for name, energy in energies.items()}
    # In inches, so that titles and legends keep their distance whatever the number of bars.
    bars, top, bottom, width = 0.3 + 0.5 * len(names), 0.75, 1.5, 11.0
    height, label = bars + top + bottom, 0.3 + 0.085 * max(map(len, names))
    figure, axes = plt.subplots(1, 2, figsize=(width, height), sharey=True)
    figure.subplots_adjust(left=label / width, right=0.99, top=1 - top / height, bottom=bottom / height, wspace=0.06)
    unit, factor = _unit(max(energy.total_mj for energy in energies.values()))
    _stack(axes[0], names, by_level, dict(zip(_LEVEL_NAMES.values(), _LEVEL_COLOURS, strict=True)), factor)
    axes[0].invert_yaxis()
    _stack(axes[1], names, by_kind, {kind: _KIND_COLOURS.get(kind, "black") for kind in _largest_kinds(by_kind)}, factor)
    for axis, title in zip(axes, ("by memory level", "by kind of layer"), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"energy [{unit}]")
        axis.legend(fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5 / bars), frameon=False)
    first = next(iter(energies.values()))
    figure.suptitle(f"{first.model.rpartition(', ')[0]} – {_conditions(energies.values())}", fontsize=10, y=1 - 0.15 / height, va="top")
    return _save(figure, plt, path)


def curve_figure(sweep: Sweep, path: str | Path) -> list[Path]:
    """Energy over a setting, its levels stacked. Writes `path` as .svg and as .png and returns both."""
    plt = _matplotlib()
    unit, factor = _unit(max(energy.total_mj for energy in sweep.energies))
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    order = sorted(range(len(sweep.values)), key=sweep.values.__getitem__)
    values, energies = [sweep.values[i] for i in order], [sweep.energies[i] for i in order]
    layers = [[energy.by_level()[level] * factor for energy in energies] for level in LEVELS]
    axis.stackplot(values, layers, labels=[_LEVEL_NAMES[level] for level in LEVELS], colors=_LEVEL_COLOURS)
    axis.plot(values, [energy.total_mj * factor for energy in energies], color="black", marker="o", markersize=3, linewidth=1)
    axis.set_xlabel(sweep.over.replace("-", " "))
    axis.set_ylabel(f"energy [{unit}]")
    axis.set_ylim(bottom=0)
    axis.margins(x=0)
    axis.set_title(f"{sweep.energies[0].model}, mode {sweep.energies[0].settings['mode']}", fontsize=10, loc="left")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, plt, path, tight=True)


def check_figure_path(path: str | Path) -> None:
    """UserError for a path that asks for another format."""
    if Path(path).suffix.lower() not in ("", *FORMATS):
        raise UserError(f"a figure is written as .svg and .png: name it without a suffix or with one of these, got {str(path)!r}")


def _stack(axis, names: list[str], parts: Mapping[str, Mapping[str, float]], order: Mapping[str, str], factor: float) -> None:
    left = [0.0] * len(names)
    for part, colour in order.items():
        if part == "other":
            widths = [sum(v for k, v in parts[name].items() if k not in order) * factor for name in names]
        else:
            widths = [parts[name].get(part, 0.0) * factor for name in names]
        axis.barh(names, widths, left=left, label=part, color=colour, height=0.68)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:#.3g}" if total < 1000 else f" {total:,.0f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.12 * max(left))
    axis.spines[["top", "right"]].set_visible(False)


def _conditions(energies: Iterable[Energy]) -> str:
    """What the bars have in common, for their title."""
    energies = list(energies)
    first, shares = energies[0].settings, {energy.settings["shift_share"] for energy in energies} - {None}
    parts = ["analytical Eyeriss model", f"mode {first['mode']}", f"coverage {first['coverage']}"]
    if first["mode"] == "eyeriss":
        parts += [f"{first['units']}", f"activations {first['bits']['activation']} bits", f"fusion {first['fusion']}"]
    if len(shares) == 1:
        source = next(energy.settings["shift_share_source"] for energy in energies if energy.settings["shift_share"] is not None)
        parts.append(f"shift share {shares.pop():.2f} ({source})")
    return ", ".join(parts)


def _largest_kinds(by_kind: Mapping[str, Mapping[str, float]], count: int = 9) -> list[str]:
    totals: dict[str, float] = {}
    for kinds in by_kind.values():
        for kind, value in kinds.items():
            totals[kind] = totals.get(kind, 0.0) + value
    ranked = sorted(totals, key=lambda kind: -totals[kind])
    return ranked if len(ranked) <= count else [*ranked[:count], "other"]


def _unit(largest_mj: float) -> tuple[str, float]:
    return ("J", 1e-3) if largest_mj >= 1e4 else ("mJ", 1.0)


def _save(figure, plt: ModuleType, path: str | Path, tight: bool = False) -> list[Path]:
    written = []
    for suffix in FORMATS:
        target = Path(path).with_suffix(suffix)
        with atomic_write(target) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=160, bbox_inches="tight" if tight else None)
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
