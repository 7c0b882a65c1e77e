"""From results to the page's tables besides the comparison."""

from shiftaddvit.published import PublishedView, view_synthesis

from .ablation import TOP1
from .charted import LEVEL_NAMES
from .maps import in_words
from .read_costs import LEVELS
from .results import EnergyResult, ExpertTimes, Results, ViewResult
from .tables import NONE, NOT_RUN, Cell, Column, Table, signed, words


def energy_table(found: EnergyResult, number: int) -> Table:
    """Every operation with its levels: for files, not for the page."""
    columns = (
        Column("operation", "", False),
        Column("kind", "", False),
        Column("primitive", "", False),
        *(Column(f"{LEVEL_NAMES[level]}, mJ", better="lower") for level in LEVELS),
    )
    rows = tuple(
        (
            words(layer.name),
            words(layer.kind),
            words(layer.primitive),
            *(Cell("modelled", f"{layer.levels[level]:.4g}", layer.levels[level]) for level in LEVELS),
        )
        for layer in found.layers
    )
    return Table(f"energy-layers-{number}", f"Energy of one forward: {found.model.name}, {found.recipe}", columns, rows)


def view_table(views: list[ViewResult]) -> Table | None:
    """The 3D table; None without results of our own."""
    if not views:
        return None
    scenes = list(dict.fromkeys(view.scene for view in views))
    columns = [Column("row", "", False)]
    columns += [Column(f"{scene} PSNR", "published", better="higher") for scene in ("LLFF", "Orchids", "Flower")]
    columns += [Column("LLFF SSIM", "published", better="higher"), Column("LLFF LPIPS", "published", better="lower")]
    columns += [Column("s/image", "published", better="lower"), Column("J/image", "published", better="lower")]
    quantities = (
        ("PSNR, dB", "psnr", "{:.2f}", "higher"),
        ("SSIM", "ssim", "{:.3f}", "higher"),
        ("LPIPS", "lpips", "{:.3f}", "lower"),
        ("s/image", "seconds", "{:.2f}", "lower"),
    )
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


def _published_view(row: PublishedView | None) -> list[Cell]:
    if row is None:
        return [NONE] * 7
    llff = row.quality["llff"]
    values = [(f"{row.quality[scene][0]:.2f}", row.quality[scene][0]) for scene in ("llff", "orchids", "flower")]
    values += [(f"{llff[1]:.3f}", llff[1]), (f"{llff[2]:.3f}", llff[2]), (f"{row.seconds:g}", row.seconds)]
    return [Cell("published", text, value) for text, value in values] + [
        NONE if row.joules is None else Cell("published", f"{row.joules:g}", row.joules)
    ]


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
    models = list(dict.fromkeys(row.model for row in results.sensitivities))
    columns = (
        *([Column("model", "", False)] if len(models) > 1 else []),
        Column("where", "", False),
        Column("becomes", "", False, note="what this one attention or MLP is replaced by; everything else stays as it was"),
        Column("top-1 %", better="higher", note=TOP1),
        Column("against dense, points", better="higher", note="top-1 less that of the dense model, on the same images"),
        Column("95 % interval", "", False, note="of the difference: where it holds zero, no difference has been shown"),
    )
    rows = []
    for row in sorted(results.sensitivities, key=lambda row: row.difference):
        low, high = row.interval95
        change = Cell("measured", signed(row.difference), row.difference)
        where = words("all of them" if row.where == "all" else in_words(row.where), row.where)
        interval = words(f"{signed(low)} … {signed(high)}")
        cells = (where, words(row.primitive), Cell("measured", f"{row.top1:.2f}", row.top1), change, interval)
        rows.append((words(row.model), *cells) if len(models) > 1 else cells)
    of = f", {models[0]}" if len(models) == 1 and models[0] else ""
    return Table("sensitivity", f"One change at a time, without fine-tuning; the costliest first{of}", columns, tuple(rows))


def speed_table(results: Results) -> Table | None:
    """Whole models in the engine's benchmark."""
    if not results.speeds:
        return None
    columns = (
        Column("model", "", False),
        Column("contender", "", False),
        Column("batch"),
        Column("time, µs", better="lower"),
        Column("images/s", better="higher"),
        Column("device", "", False),
    )
    rows = []
    for speed in results.speeds:
        time = rate = Cell("not run", "wrong result" if speed.status.startswith("wrong") else "not run", None, speed.status)
        if speed.median_us is not None:
            time = Cell(
                "measured",
                f"{speed.median_us:,.1f}",
                speed.median_us,
                f"median; tenth to ninetieth percentile {speed.low_us:.1f} … {speed.high_us:.1f} µs",
            )
            rate = Cell("measured", f"{speed.images_per_s:,.0f}", speed.images_per_s)
        rows.append(
            (
                words(speed.model.sized),
                words(speed.contender),
                Cell("text", str(speed.batch), speed.batch),
                time,
                rate,
                words(str(speed.source.conditions.get("device", "?"))),
            )
        )
    return Table("speed", "Whole models, correct first, then timed", columns, tuple(rows))


def op_table(results: Results) -> Table | None:
    """Single ops."""
    if not results.ops:
        return None
    columns = (
        Column("op", "", False),
        Column("shape", "", False),
        Column("contender", "", False),
        Column("time, µs", better="lower"),
        Column("of the hardware's floor, %", better="higher", note="the least time that memory or arithmetic allow, over this time"),
        Column("device", "", False),
    )
    rows = []
    for op in results.ops:
        time = (
            Cell("not run", "wrong result")
            if op.median_us is None
            else Cell("measured", f"{op.median_us:.2f}", op.median_us, str(op.source.conditions.get("device", "")))
        )
        share = NONE if op.share_of_floor is None else Cell("measured", f"{100 * op.share_of_floor:.0f}", 100 * op.share_of_floor)
        rows.append((words(op.op), words(op.shape), words(op.contender), time, share, words(str(op.source.conditions.get("device", "?")))))
    return Table("ops", "Single operations", columns, tuple(rows))


def expert_table(results: Results) -> Table | None:
    """The measured time of every expert; where a layer was measured twice on a device the newest counts."""
    if not results.expert_times:
        return None
    columns = (
        Column("layer, features", "", False),
        Column("tokens", note="at once: all tokens of a batch"),
        Column("type", "", False),
        Column("multiplication expert, µs", better="lower"),
        Column("shift expert, µs", better="lower"),
        Column("shift / multiplication", better="lower", note="above 1 the shift expert is the slower one on this device"),
        Column("tokens that should shift, %", note="the share at which both experts take equally long"),
        Column("device", "", False),
    )
    newest = {one.same: one for one in sorted(results.expert_times, key=lambda one: one.time)}
    rows = [_expert_row(one) for one in sorted(newest.values(), key=lambda one: (one.device, one.layer, one.shape, one.tokens))]
    notes = [
        "Each expert alone on all tokens of the layer, in its form at inference. The balance loss asks for tokens in inverse proportion to these "
        "times: “tokens that should shift” is the share at which both experts of a layer would take equally long.",
    ]
    if len(newest) < len(results.expert_times):
        notes.append(f"{len(results.expert_times) - len(newest)} older or repeated measurements of the same layers on the same device are set aside.")
    return Table("experts", "Time of each expert, by layer shape", columns, tuple(rows), tuple(notes))


def _expert_row(found: ExpertTimes) -> tuple[Cell, ...]:
    names = ", ".join(found.mixtures) or "modules not recorded"
    layer = words(f"{'MLP' if found.layer == 'mlp' else found.layer} {' → '.join(map(str, found.shape))}", names)
    mult, shift = found.microseconds("mult"), found.microseconds("shift")
    how = f"{found.timed or 'median'}; {found.source.path}"
    ratio = share = NONE
    if mult and shift:
        slower = _mean(shift) / _mean(mult)
        ratio = Cell("measured", f"{slower:.2f}", slower, "above 1 the shift expert is the slower one on this device")
        rates = [1 / time for time in (*mult, *shift)]
        wanted = 100 * sum(rates[len(mult) :]) / sum(rates)
        share = Cell("measured", f"{wanted:.0f}", wanted, "from the times of this row: in proportion to 1 / time")
    times = [Cell("measured", " / ".join(f"{t:,.1f}" for t in times), _mean(times), how) if times else NONE for times in (mult, shift)]
    return (layer, Cell("text", f"{found.tokens:,}", found.tokens), words(found.dtype), *times, ratio, share, words(found.device))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
