"""The ablation tables: one for each network and data set, the rows of the paper's table in its order, every cell saying whose number it is."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt

from shiftaddvit.intervals import paired_interval
from shiftaddvit.published import PublishedResult, PublishedRow, classification

from .networks import ModelRef
from .results import EnergyResult, Results, RunResult, SpeedResult
from .tables import NONE, NOT_RUN, Cell, Column, Table, signed, words

PUBLISHED_SIZE = (224, 224)
IMAGENET = "imagenet"
TOP1 = "share of the test images whose most likely class is the right one"
DESIGN = "what the row is"
"""Group of the columns that describe a row."""


@dataclass(frozen=True)
class Subject:
    """What one table is about."""

    model: ModelRef
    """The network."""
    data: str = ""
    """What accuracies are of; empty for a table without measured accuracies."""
    images: int = 0
    """How many."""
    labels: str = ""
    """Digest of their labels: other images under the same name are another table."""

    @property
    def title(self) -> str:
        """For people."""
        return self.model.sized + (f" · {self.data} ({self.images:,} images)" if self.data else "")


@dataclass(frozen=True)
class Line:
    """One row's measurements: the runs of one recipe in one configuration."""

    recipe: str
    """Name, or `dense`."""
    label: str
    """For people."""
    runs: tuple[RunResult, ...]
    """Its seeds; empty where nothing was run."""
    energy: EnergyResult | None = None
    """Modelled."""
    speed: SpeedResult | None = None
    """At batch 1."""
    throughput: SpeedResult | None = None
    """At the batch with the most images a second."""

    @property
    def top1(self) -> float | None:
        """Mean over the runs, in %."""
        return sum(run.accuracy.top1 for run in self.runs) / len(self.runs) if self.runs else None


@dataclass(frozen=True)
class Comparison:
    """One table's content."""

    subject: Subject
    """What it is about."""
    lines: tuple[Line, ...]
    """In the order of the paper's table, then the others."""
    published: bool
    """Whether the paper has numbers of this network at this size."""
    control: Line | None
    """The dense line that differences are against."""


def comparisons(results: Results) -> tuple[Comparison, ...]:
    """Measured networks first, then the paper's two tables."""
    measured = dict.fromkeys(map(_subject, results.runs))
    found = [_comparison(subject, results) for subject in measured]
    covered = {c.subject.model.name for c in found if c.published}
    for name in ("pvt_v2_b0", "pvt_tiny"):
        if name not in covered:
            found.append(_comparison(Subject(ModelRef(name, "", PUBLISHED_SIZE)), results))
    return tuple(found)


def _subject(run: RunResult) -> Subject:
    return Subject(run.model, run.data, run.accuracy.images, run.accuracy.labels_digest)


def _comparison(subject: Subject, results: Results) -> Comparison:
    rows = classification()
    published = _is_published(subject)
    runs = [run for run in results.runs if _subject(run) == subject]
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.variant), []).append(run)
    names = {row.recipe: row.label for row in rows}
    lines = [Line(row.recipe, row.label, ()) for row in rows if row.recipe not in {recipe for recipe, _ in groups}]
    several = {recipe for recipe, _ in groups if sum(other == recipe for other, _ in groups) > 1}
    for (recipe, _), group in groups.items():
        usual = names.get(recipe, "dense, as pre-trained" if recipe == "dense" else recipe)
        lines.append(Line(recipe, f"{usual} · {group[0].label}" if recipe in several else usual, tuple(group)))
    order = {row.recipe: number for number, row in enumerate(rows)} | {"dense": -1}
    lines.sort(key=lambda line: order.get(line.recipe, len(order)))
    setting = _usual_setting(subject.model, results)
    lines = [_with_costs(line, subject.model, setting, results) for line in lines]
    return Comparison(subject, tuple(lines), published, _control(lines))


def _is_published(subject: Subject) -> bool:
    on_imagenet = not subject.data or (IMAGENET in subject.data.lower() and "tiny" not in subject.data.lower())
    known = any(subject.model.name in row.results for row in classification())
    return known and not subject.model.args and subject.model.size == PUBLISHED_SIZE and on_imagenet


def _control(lines: Iterable[Line]) -> Line | None:
    """The dense model that had the same training, where there is one, else the dense model."""
    dense = [line for line in lines if line.recipe == "dense" and line.runs]
    tuned = [line for line in dense if "ft" in line.runs[0].label.split("-")]
    return (tuned or dense or [None])[0]


def _usual_setting(model: ModelRef, results: Results) -> str:
    """The setting of the accelerator that most of a network's energies were computed with, of equals the newest: a column has one setting."""
    energies = [e for e in results.energies if e.model == model and e.mode == "eyeriss"]
    found = [e.setting for e in sorted(energies, key=lambda e: e.source.time, reverse=True)]
    return max(found, key=found.count, default="")


def _with_costs(line: Line, model: ModelRef, setting: str, results: Results) -> Line:
    """Of several measurements the newest counts."""
    energies = [e for e in results.energies if e.model == model and e.recipe == line.recipe and e.mode == "eyeriss" and e.setting == setting]
    speeds = [s for s in results.speeds if s.model == model and s.recipe == line.recipe and s.median_us is not None]
    single = [s for s in speeds if s.batch == 1]
    return replace(
        line,
        energy=max(energies, key=lambda e: e.source.time, default=None),
        speed=max(single, key=lambda s: s.source.time, default=None),
        throughput=max(speeds, key=lambda s: (s.images_per_s, s.source.time), default=None),
    )


def table(found: Comparison, number: int) -> Table:
    """As a table. Columns of numbers that nobody has for this network are left out, but for accuracy, latency and energy."""
    rows = {row.recipe: row for row in classification()}
    design = [Column("row", "", False), *(Column(title, DESIGN, False) for title in ("attention", "add", "attn linears", "MLP"))]
    paper = [
        Column("top-1 %", "published", better="higher", note=TOP1), Column("latency, ms", "published", better="lower"),
        Column("images/s", "published", better="higher"), Column("energy, mJ", "published", better="lower"),
    ]  # fmt: skip
    shown = (
        ("top-1 %", "measured here", "higher", TOP1, _accuracy),
        (
            "vs dense, points",
            "measured here",
            "higher",
            "top-1 less that of the dense model, on the same images",
            lambda x: _difference(x, found.control),
        ),
        ("latency, ms", "measured here", "lower", "time for one image by itself", _latency),
        ("images/s", "measured here", "higher", "with as many images at once as is fastest", _throughput),
        ("on shift, %", "measured here", "", "share of the tokens that the shift experts compute", _share),
        ("mults gone, %", "measured here", "higher", "share of the dense model's multiplications that are no longer there", _removed),
        ("file, kB", "measured here", "lower", "the saved model", _size),
        ("energy, mJ", "modelled here", "lower", "of one image, by the analytical model", _energy),
    )
    ours = [(Column(title, group, better=better, note=note), [cell(line) for line in found.lines]) for title, group, better, note, cell in shown]
    always = {"top-1 %", "energy, mJ"} | ({"latency, ms"} if found.published else set())
    ours = [(column, cells) for column, cells in ours if column.title in always or any(cell.kind not in ("not run", "none") for cell in cells)]
    columns = [*design, *(paper if found.published else []), *(column for column, _ in ours)]
    body = []
    for index, line in enumerate(found.lines):
        row = rows.get(line.recipe)
        cells = [words(line.label, f"recipe {line.recipe}" + (f", {len(line.runs)} runs" if len(line.runs) > 1 else "")), *_design(line, row)]
        cells += _paper(row.results.get(found.subject.model.name) if row else None) if found.published else []
        body.append(tuple(cells + [column[index] for _, column in ours]))
    return Table(f"ablation-{number}", found.subject.title, tuple(columns), tuple(body), tuple(_notes(found)))


def _notes(found: Comparison) -> list[str]:
    notes = []
    if found.published:
        notes.append(
            "Published: ImageNet-1k at 224×224, latency at batch 1 and throughput on an RTX 3090; † compiled with TVM, "
            "* simulated as if experts ran in parallel for free."
        )
    if found.control is not None:
        notes.append(f"Differences are against “{found.control.label}”, image by image on the same images; in brackets the 95 % interval of them.")
    if any(len(line.runs) > 1 for line in found.lines):
        notes.append("± after a top-1 is the standard deviation over runs that differ in their seed alone, of which it is the mean.")
    if any(line.energy for line in found.lines):
        notes.append("Energy is computed for one image by an analytical model of the Eyeriss accelerator (mode eyeriss); it is never a measurement.")
    devices = sorted({str(run.source.conditions.get("device", "")) for line in found.lines for run in line.runs} - {""})
    if devices:
        notes.append(f"Accuracies were measured on {', '.join(devices)}.")
    timed = sorted({str(one.source.conditions.get("device", "?")) for line in found.lines for one in (line.speed, line.throughput) if one})
    if timed:
        notes.append(f"Latency and images/s were measured on {', '.join(timed)}.")
    return notes


def _design(line: Line, row: PublishedRow | None) -> list[Cell]:
    if row is None:
        return [words("as pre-trained"), words(""), words(""), words("")] if line.recipe == "dense" else [words("") for _ in range(4)]
    return [words(row.attention), words(row.add), words(row.attn_linear), words(row.mlp)]


def _paper(result: PublishedResult | None) -> list[Cell]:
    if result is None:
        return [NONE, NONE, NONE, NONE]
    mark = "†" if result.compiled else ""
    how = "compiled with TVM" if result.compiled else "eager PyTorch"
    latency = NONE
    if result.latency_ms is not None:
        extra = f" / {result.modularised_ms:.2f}*" if result.modularised_ms else ""
        latency = Cell("published", f"{result.latency_ms:.2f}{mark}{extra}", result.latency_ms, how)
    top1 = (
        Cell("published", f"{result.top1:.2f}", result.top1)
        if result.top1 is not None
        else Cell("published", "NaN", None, "the paper prints NaN")
        if result.diverged
        else NONE
    )
    rate = NONE if result.images_per_s is None else Cell("published", f"{result.images_per_s:.0f}{mark}", result.images_per_s, how)
    return [top1, latency, rate, NONE if result.energy_mj is None else Cell("published", f"{result.energy_mj:.2f}", result.energy_mj)]


def _accuracy(line: Line) -> Cell:
    if line.top1 is None:
        return NOT_RUN
    first = line.runs[0].accuracy
    if len(line.runs) > 1:
        spread = sqrt(sum((run.accuracy.top1 - line.top1) ** 2 for run in line.runs) / (len(line.runs) - 1))
        return Cell(
            "measured",
            f"{line.top1:.2f} ± {spread:.2f}",
            line.top1,
            f"mean and standard deviation of {len(line.runs)} runs, {first.images:,} images each",
        )
    low, high = first.interval95
    return Cell(
        "measured", f"{line.top1:.2f}", line.top1, f"95 % interval {low:.2f} … {high:.2f}, {first.images:,} images; {line.runs[0].source.path}"
    )


def _difference(line: Line, control: Line | None) -> Cell:
    """Mean over the seeds that both have. The seeds share their images, so the interval of the mean is not narrower for them."""
    if control is None or not line.runs:
        return NOT_RUN
    if line is control:
        return words("control")
    pairs = [(run, other) for run in line.runs for other in control.runs if _paired(run, other, len(control.runs) > 1)]
    if not pairs:
        return Cell("none", "–", None, "not evaluated on the same images as the control")
    differences, below, above = [], [], []
    for run, other in pairs:
        images, mine, theirs = run.accuracy.images, run.accuracy.right, other.accuracy.right
        only_first, only_second = (mine & ~theirs).bit_count(), (theirs & ~mine).bit_count()
        low, high = paired_interval(only_first, only_second, images)
        differences.append(100 * (only_first - only_second) / images)
        below.append(differences[-1] - low)
        above.append(high - differences[-1])
    mean, (down, up) = sum(differences) / len(pairs), (sqrt(sum(side * side for side in sides) / len(pairs)) for sides in (below, above))
    return Cell(
        "measured",
        f"{signed(mean)} ({signed(mean - down)} … {signed(mean + up)})",
        mean,
        f"paired 95 % interval, {len(pairs)} pair{'s' if len(pairs) > 1 else ''} of runs",
    )


def _paired(run: RunResult, other: RunResult, by_seed: bool) -> bool:
    same = (run.accuracy.images, run.accuracy.labels_digest) == (other.accuracy.images, other.accuracy.labels_digest)
    return same and (not by_seed or run.seed == other.seed)


def _latency(line: Line) -> Cell:
    speed = line.speed
    if speed is None:
        return NOT_RUN
    device, dtype = speed.source.conditions.get("device", "?"), speed.source.conditions.get("dtype", "?")
    return Cell(
        "measured",
        f"{speed.median_us / 1000:.3f}",
        speed.median_us / 1000,
        f"batch 1, {dtype}, {device}; {speed.low_us:.0f} … {speed.high_us:.0f} µs",
    )


def _throughput(line: Line) -> Cell:
    speed = line.throughput
    if speed is None:
        return NOT_RUN
    return Cell("measured", f"{speed.images_per_s:,.0f}", speed.images_per_s, f"batch {speed.batch}, {speed.source.conditions.get('device', '?')}")


def _share(line: Line) -> Cell:
    shares = [run.shift_share for run in line.runs if run.shift_share is not None]
    if shares:
        mean = 100 * sum(shares) / len(shares)
        return Cell("measured", f"{mean:.0f}", mean, "of all tokens of all mixtures" if mean < 100 else "every linear shifts")
    return NONE if line.runs else NOT_RUN


def _removed(line: Line) -> Cell:
    found = [run.removed for run in line.runs if run.removed is not None]
    if found:
        value = 100 * sum(found) / len(found)
        return Cell("measured", f"{value:.1f}".replace("-", "−"), value, "of the dense model's multiplications; below zero there are more of them")
    return NONE if line.runs else NOT_RUN


def _size(line: Line) -> Cell:
    sizes = [run.bytes for run in line.runs if run.bytes is not None]
    if sizes:
        return Cell("measured", f"{sizes[0] / 1000:,.0f}", sizes[0] / 1000, "packed; the dense model in float32")
    return NONE if line.runs else NOT_RUN


def _energy(line: Line) -> Cell:
    if line.energy is None:
        return NOT_RUN
    share = line.energy.shift_share
    routed = "" if share is None else f"; {100 * share:.0f} % of the tokens on shift ({line.energy.share_source})"
    return Cell("modelled", f"{line.energy.mj_per_image:.4g}", line.energy.mj_per_image, f"one image, analytical Eyeriss model{routed}")
