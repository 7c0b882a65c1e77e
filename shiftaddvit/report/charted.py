"""From results to the page's charts."""

import json
from collections.abc import Iterable

from shiftaddvit.published import classification

from .ablation import Comparison, Line
from .charts import Bars, Lines, Point, Scatter, Series
from .maps import block_and_linear, in_words
from .read_costs import LEVELS
from .results import Curve, EnergyResult, Results

LEVEL_NAMES = {"dram": "off-chip memory", "buffer": "on-chip buffer", "noc": "network on chip", "rf": "registers", "compute": "arithmetic"}


def published_tradeoffs() -> tuple[Scatter, ...]:
    """Accuracy against latency and energy, the paper's numbers alone."""
    rows = classification()
    found = []
    for key, quantity, title in (("latency_ms", "ms at batch 1, RTX 3090", "latency"), ("energy_mj", "mJ an image, analytical model", "energy")):
        series = []
        for name, shown in (("pvt_v2_b0", "PVTv2-B0"), ("pvt_tiny", "PVTv1-T"), ("deit_tiny_patch16_224", "DeiT-T")):
            points = tuple(
                Point(
                    getattr(result, key), result.top1, row.label, f"{shown}: {result.top1:g} % top-1, {getattr(result, key):g} {quantity}, published"
                )
                for row in rows
                if (result := row.results.get(name)) is not None and result.top1 is not None and getattr(result, key) is not None
            )
            if len(points) > 1:
                series.append(Series(shown, points))
        found.append(
            Scatter(
                f"published-{title}",
                f"Accuracy against {title}",
                f"{title}, {quantity}",
                "top-1, %",
                ("published",),
                tuple(series),
                "ImageNet-1k at 224×224, the paper's numbers",
                key == "latency_ms",
            )
        )
    return tuple(found)


def measured_tradeoffs(found: Comparison, number: int) -> tuple[Scatter, ...]:
    """Accuracy against what each row costs, our numbers alone; charts with fewer than two points are left out."""
    kinds = (
        ("energy", "energy (modelled), mJ an image", lambda line: line.energy and line.energy.mj_per_image),
        ("latency", "latency, ms at batch 1", lambda line: line.speed and line.speed.median_us / 1000),
        ("multiplications", "multiplications left, % of dense", lambda line: _first(100 * (1 - run.removed) for run in line.runs if run.removed is not None)),
        ("size", "file, kB", lambda line: _first(run.bytes / 1000 for run in line.runs if run.bytes is not None)),
    )  # fmt: skip
    charts = []
    for name, axis, cost in kinds:
        points = tuple(_point(line, float(x), axis) for line in found.lines if line.top1 is not None and (x := cost(line)) is not None)
        if len(points) > 1:
            sources = ("measured", "modelled") if name == "energy" else ("measured",)
            series = (Series("measured here", points),)
            charts.append(Scatter(f"measured-{number}-{name}", f"Accuracy against {name}", axis, "top-1, %", sources, series, found.subject.title))
    return tuple(charts)


def _point(line: Line, x: float, axis: str) -> Point:
    low, high = line.runs[0].accuracy.interval95 if len(line.runs) == 1 else (None, None)
    interval = f" (95 % {low:.1f} … {high:.1f})" if low is not None else f" (mean of {len(line.runs)} runs)"
    return Point(x, line.top1, line.label, f"top-1 {line.top1:.2f} %{interval}, {axis.split(',')[0]} {x:.4g}", low, high)


def _first(values: Iterable[float]) -> float | None:
    return next(iter(values), None)


def energy_totals(energies: Iterable[EnergyResult]) -> tuple[Bars, ...]:
    """One chart for each network and setting: a bar a recipe, by level."""
    groups: dict[tuple, list[EnergyResult]] = {}
    for found in energies:
        groups.setdefault((found.model, found.mode, found.setting), []).append(found)
    charts = []
    for number, ((model, mode, setting), group) in enumerate(groups.items()):
        newest = {e.recipe: e for e in sorted(group, key=lambda e: e.source.time)}
        rows = tuple((recipe, _levels(e)) for recipe, e in sorted(newest.items(), key=lambda entry: -entry[1].mj_per_image))
        special = _special(setting, [other for m, kind, other in groups if (m, kind) == (model, mode)])
        title = f"{model.sized}, one image, mode {mode}{special}"
        charts.append(Bars(f"energy-{number}", title, "mJ", tuple(LEVEL_NAMES.values()), rows))
    return tuple(charts)


def _special(setting: str, settings: list[str]) -> str:
    """What tells a setting from the others of a network, in words."""
    mine, all_of_them = json.loads(setting), [json.loads(other) for other in settings]
    differ = [key for key in mine if any(other.get(key) != mine[key] for other in all_of_them)]
    return "".join(f", {key.replace('_', ' ')} {mine[key]}" for key in differ if not key.endswith("source"))


def _levels(found: EnergyResult) -> tuple[float, ...]:
    return tuple(sum(layer.levels[level] for layer in found.layers) / found.batch for level in LEVELS)


def energy_by_layer(found: EnergyResult, number: int) -> Bars:
    """One bar for each part of the network (the attention or MLP of one block, the rest by first name), in the order of execution."""
    parts: dict[str, list[float]] = {}
    for layer in found.layers:
        total = parts.setdefault(_part(layer.name), [0.0] * len(LEVELS))
        for index, level in enumerate(LEVELS):
            total[index] += layer.levels[level] / found.batch
    unit, factor = ("µJ", 1e3) if max((sum(values) for values in parts.values()), default=0.0) < 0.1 else ("mJ", 1.0)
    rows = tuple((part, tuple(factor * value for value in values)) for part, values in parts.items())
    return Bars(
        f"energy-layers-{number}",
        f"{found.model.name}, {found.recipe}: {found.mj_per_image:.4g} mJ an image",
        unit,
        tuple(LEVEL_NAMES.values()),
        rows,
    )


def _part(name: str) -> str:
    """`stage 1 · block 2, attention` of `stages.0.blocks.1.attn.qkv.experts.0`."""
    pieces = name.split(" ")[0].split(".")
    for number, piece in enumerate(pieces):
        if piece in ("attn", "mlp"):
            return in_words(".".join(pieces[: number + 1]))
    numbers = [number for number, piece in enumerate(pieces) if piece.isdigit()]
    return f"{block_and_linear('.'.join(pieces[: numbers[-1] + 1]))[0]}, rest" if numbers else pieces[0]


def share_charts(results: Results) -> tuple[Bars, ...]:
    """The share of tokens on a shift expert, mixture by mixture: from dispatch files, else from energies with measured routing."""
    charts = []
    for number, found in enumerate(results.dispatches):
        rows = tuple((in_words(mixture.name), (1 - mixture.shift_share, mixture.shift_share)) for mixture in found.mixtures)
        charts.append(_shares(f"shares-{number}", f"{found.title} · {found.images:,} images", rows))
    if not charts:
        for number, energy in enumerate(e for e in results.energies if e.shares):
            rows = tuple((in_words(name), (1 - share, share)) for name, share in energy.shares)
            charts.append(_shares(f"shares-{number}", f"{energy.model.name}, {energy.recipe} · {energy.share_source}", rows))
    return tuple(charts)


def _shares(name: str, title: str, rows: tuple[tuple[str, tuple[float, float]], ...]) -> Bars:
    percent = tuple((label, (100 * mult, 100 * shift)) for label, (mult, shift) in rows)
    return Bars(name, title, "%", ("multiplication expert", "shift expert"), percent, 100.0)


def curve_charts(curves: Iterable[Curve]) -> tuple[Lines, ...]:
    """Loss and accuracy over epochs; quality over steps for view synthesis. At most eight curves a chart, so that they can be told apart."""
    curves = list(curves)
    charts: list[Lines] = []
    for kind, what, x_label, y_label in (
        ("classification", "loss", "epochs, over all stages", "training loss"),
        ("classification", "score", "epochs, over all stages", "top-1, %"),
        ("view synthesis", "loss", "steps", "PSNR on training pixels, dB"),
        ("view synthesis", "score", "steps", "PSNR on held-out pixels, dB"),
    ):
        series = []
        for curve in curves:
            points = tuple(Point(x, y, curve.label) for x, y in getattr(curve, what))
            if curve.kind == kind and len(points) > 1:
                series.append(Series(curve.label if curve.finished else f"{curve.label} (not finished)", points))
        for start in range(0, len(series), 8):
            part = f", part {start // 8 + 1}" if len(series) > 8 else ""
            charts.append(
                Lines(f"curves-{len(charts)}", f"{y_label[0].upper()}{y_label[1:]}{part}", x_label, y_label, tuple(series[start : start + 8]))
            )
    return tuple(charts)
