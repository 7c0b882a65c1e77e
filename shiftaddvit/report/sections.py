"""From results to the page's other tables and charts."""

from collections.abc import Iterable

from shiftaddvit.published import classification, view_synthesis

from .ablation import Comparison, Line
from .charts import Bars, Lines, Point, Scatter, Series
from .read_costs import LEVELS
from .results import Curve, EnergyResult, Results, ViewResult
from .tables import NONE, NOT_RUN, Cell, Column, Table, words

LEVEL_NAMES = {"dram": "off-chip memory", "buffer": "on-chip buffer", "noc": "network on chip", "rf": "registers", "compute": "arithmetic"}


def published_tradeoffs() -> tuple[Scatter, ...]:
    """Accuracy against latency and energy, the paper's numbers alone."""
    rows = classification()
    found = []
    for key, quantity, title in (("latency_ms", "ms at batch 1, RTX 3090", "latency"), ("energy_mj", "mJ an image, analytical model", "energy")):
        series = []
        for name, shown in (("pvt_v2_b0", "PVTv2-B0"), ("pvt_tiny", "PVTv1-T"), ("deit_tiny_patch16_224", "DeiT-T")):
            points = tuple(
                Point(getattr(result, key), result.top1, row.label, f"{shown}: {result.top1:g} % top-1, {getattr(result, key):g} {quantity}, published")
                for row in rows
                if (result := row.results.get(name)) is not None and result.top1 is not None and getattr(result, key) is not None
            )
            if len(points) > 1:
                series.append(Series(shown, points))
        found.append(Scatter(f"published-{title}", f"Accuracy against {title}", f"{title}, {quantity}", "top-1, %", ("published",), tuple(series), "ImageNet-1k at 224×224, the paper's numbers", key == "latency_ms"))
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
    for number, ((model, mode, _), group) in enumerate(groups.items()):
        newest = {e.recipe: e for e in sorted(group, key=lambda e: e.source.time)}
        rows = tuple((recipe, _levels(e)) for recipe, e in sorted(newest.items(), key=lambda entry: -entry[1].mj_per_image))
        size = f" at {model.size[0]}×{model.size[1]}" if model.size else ""
        charts.append(Bars(f"energy-{number}", f"{model.name}{size}, one image, mode {mode}", "mJ", tuple(LEVEL_NAMES.values()), rows))
    return tuple(charts)


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
    return Bars(f"energy-layers-{number}", f"{found.model.name}, {found.recipe}: {found.mj_per_image:.4g} mJ an image", unit, tuple(LEVEL_NAMES.values()), rows)


def _part(name: str) -> str:
    """`stages.0.blocks.1.attn` of `stages.0.blocks.1.attn.qkv.experts.0`."""
    pieces = name.split(" ")[0].split(".")
    for number, piece in enumerate(pieces):
        if piece in ("attn", "mlp"):
            return ".".join(pieces[: number + 1])
    numbers = [number for number, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[: numbers[-1] + 1]) if numbers else pieces[0]


def energy_table(found: EnergyResult, number: int) -> Table:
    """Every operation with its levels: for files, not for the page."""
    columns = (Column("operation", "", False), Column("kind", "", False), Column("primitive", "", False), *(Column(f"{LEVEL_NAMES[level]}, mJ", better="lower") for level in LEVELS))
    rows = tuple(
        (words(layer.name), words(layer.kind), words(layer.primitive), *(Cell("modelled", f"{layer.levels[level]:.4g}", layer.levels[level]) for level in LEVELS))
        for layer in found.layers
    )
    return Table(f"energy-layers-{number}", f"Energy of one forward: {found.model.name}, {found.recipe}", columns, rows)


def share_charts(results: Results) -> tuple[Bars, ...]:
    """The share of tokens on a shift expert, mixture by mixture: from dispatch files, else from energies with measured routing."""
    charts = []
    for number, found in enumerate(results.dispatches):
        rows = tuple((mixture.name, (1 - mixture.shift_share, mixture.shift_share)) for mixture in found.mixtures)
        charts.append(_shares(f"shares-{number}", f"{found.title} · {found.images:,} images", rows))
    if not charts:
        for number, energy in enumerate(e for e in results.energies if e.shares):
            rows = tuple((name, (1 - share, share)) for name, share in energy.shares)
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
            charts.append(Lines(f"curves-{len(charts)}", f"{y_label[0].upper()}{y_label[1:]}{part}", x_label, y_label, tuple(series[start : start + 8])))
    return tuple(charts)


def view_table(views: list[ViewResult]) -> Table | None:
    """The 3D table; None without results of our own."""
    if not views:
        return None
    scenes = list(dict.fromkeys(view.scene for view in views))
    columns = [Column("row", "", False)]
    columns += [Column(f"{scene} PSNR", "published", better="higher") for scene in ("LLFF", "Orchids", "Flower")]
    columns += [Column("LLFF SSIM", "published", better="higher"), Column("LLFF LPIPS", "published", better="lower")]
    columns += [Column("s/image", "published", better="lower"), Column("J/image", "published", better="lower")]
    quantities = (("PSNR, dB", "psnr", "{:.2f}", "higher"), ("SSIM", "ssim", "{:.3f}", "higher"), ("LPIPS", "lpips", "{:.3f}", "lower"), ("s/image", "seconds", "{:.2f}", "lower"))
    for scene in scenes:
        columns += [Column(title, f"measured here · {scene}", better=better) for title, _, _, better in quantities]
    columns.append(Column("J/image", "modelled here", better="lower"))
    known = {row.row: row for row in view_synthesis()}
    rows = []
    for name in dict.fromkeys([*known, *(view.row for view in views)]):
        mine = [view for view in views if view.row == name]
        cells = [words(known[name].label if name in known else name)]
        cells += _published_view(known.get(name))
        for scene in scenes:
            cells += [_newest([v for v in mine if v.scene == scene], key, form) for _, key, form, _ in quantities]
        cells.append(_newest(mine, "joules", "{:.0f}", "modelled"))
        rows.append(tuple(cells))
    notes = ("Published: LLFF at 504×378, mean of eight scenes where no scene is named; their GPU. PSNR and SSIM: more is better; LPIPS: less is.",)
    return Table("view-synthesis", "Novel view synthesis", tuple(columns), tuple(rows), notes)


def _published_view(row: object) -> list[Cell]:
    if row is None:
        return [NONE] * 7
    llff = row.quality["llff"]
    values = [(f"{row.quality[scene][0]:.2f}", row.quality[scene][0]) for scene in ("llff", "orchids", "flower")]
    values += [(f"{llff[1]:.3f}", llff[1]), (f"{llff[2]:.3f}", llff[2]), (f"{row.seconds:g}", row.seconds)]
    return [Cell("published", text, value) for text, value in values] + [NONE if row.joules is None else Cell("published", f"{row.joules:g}", row.joules)]


def _newest(views: list[ViewResult], key: str, form: str, kind: str = "measured") -> Cell:
    found = [view for view in views if getattr(view, key) is not None]
    if not found:
        return NOT_RUN
    newest = max(found, key=lambda view: view.source.time)
    value = getattr(newest, key)
    return Cell(kind, form.format(value), value, f"{newest.source.conditions.get('device', '')}; {newest.source.path}".strip("; "))


def sensitivity_table(results: Results) -> Table | None:
    """Changes at one place each, before any fine-tuning."""
    if not results.sensitivities:
        return None
    columns = (Column("model", "", False), Column("where", "", False), Column("primitive", "", False), Column("top-1 %", better="higher"), Column("against dense, points", better="higher"))
    rows = []
    for row in sorted(results.sensitivities, key=lambda row: row.difference):
        low, high = row.interval95
        change = Cell("measured", f"{row.difference:+.2f}".replace("-", "−"), row.difference, f"paired 95 % interval {low:+.2f} … {high:+.2f}")
        rows.append((words(row.model), words(row.where), words(row.primitive), Cell("measured", f"{row.top1:.2f}", row.top1), change))
    return Table("sensitivity", "One change at a time, without fine-tuning; the costliest first", columns, tuple(rows))


def speed_table(results: Results) -> Table | None:
    """Whole models in the engine's benchmark."""
    if not results.speeds:
        return None
    columns = (Column("model", "", False), Column("contender", "", False), Column("batch"), Column("time, µs", better="lower"), Column("images/s", better="higher"), Column("device", "", False))
    rows = []
    for speed in results.speeds:
        time = rate = Cell("not run", "wrong result" if speed.status == "wrong" else "not run", None, speed.status)
        if speed.median_us is not None:
            time = Cell("measured", f"{speed.median_us:,.1f}", speed.median_us, f"median; tenth to ninetieth percentile {speed.low_us:.1f} … {speed.high_us:.1f} µs")
            rate = Cell("measured", f"{speed.images_per_s:,.0f}", speed.images_per_s)
        size = f" at {speed.model.size[0]}×{speed.model.size[1]}" if speed.model.size else ""
        rows.append((words(speed.model.name + size), words(speed.contender), Cell("text", str(speed.batch), speed.batch), time, rate, words(str(speed.source.conditions.get("device", "?")))))
    return Table("speed", "Whole models, correct first, then timed", columns, tuple(rows))


def op_table(results: Results) -> Table | None:
    """Single ops."""
    if not results.ops:
        return None
    columns = (Column("op", "", False), Column("shape", "", False), Column("contender", "", False), Column("time, µs", better="lower"), Column("of the hardware's floor, %", better="higher"))
    rows = []
    for op in results.ops:
        time = Cell("not run", "wrong result") if op.median_us is None else Cell("measured", f"{op.median_us:.2f}", op.median_us, str(op.source.conditions.get("device", "")))
        share = NONE if op.share_of_floor is None else Cell("measured", f"{100 * op.share_of_floor:.0f}", 100 * op.share_of_floor)
        rows.append((words(op.op), words(op.shape), words(op.contender), time, share))
    return Table("ops", "Single operations", columns, tuple(rows))
