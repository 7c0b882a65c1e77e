"""Everything that the page and the files for papers are made of, arranged."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shiftaddvit.published import classification

from . import charted, tabulated
from .ablation import Comparison, comparisons
from .ablation import table as ablation_table
from .charts import Bars, Chart, Lines, Scatter
from .results import Results, RunResult, Skipped
from .shown_search import ShownSearch, search_latency_tables, shown_search
from .tables import Table, Tile


@dataclass(frozen=True)
class Content:
    """In the order of the page."""

    results: Results
    """As read, but of energies and times that several files have the newest alone."""
    comparisons: tuple[Comparison, ...]
    """Measured networks first."""
    ablations: tuple[Table, ...]
    """One for each comparison."""
    tradeoffs: tuple[Scatter, ...]
    """Measured, then published."""
    searches: tuple[ShownSearch, ...]
    """As read."""
    search_latencies: tuple[Table, ...]
    """Measured times of a search's options."""
    energy_totals: tuple[Bars, ...]
    """By recipe and level."""
    energy_layers: tuple[Bars, ...]
    """By part of the network and level."""
    shares: tuple[Bars, ...]
    """Tokens on shift, by mixture."""
    curves: tuple[Lines, ...]
    """Of training."""
    tables: tuple[Table, ...]
    """Sensitivity, view synthesis, speed, experts: those that there are."""
    layer_tables: tuple[Table, ...]
    """Every operation's energy: for files alone."""
    aside: tuple[Skipped, ...]
    """Files of which a number does not count, because a newer one has the same."""

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All."""
        searched = tuple(chart for search in self.searches for chart in (*search.charts, search.matrix))
        return (*self.tradeoffs, *searched, *self.energy_totals, *self.energy_layers, *self.shares, *self.curves)

    @property
    def all_tables(self) -> tuple[Table, ...]:
        """All, for files."""
        searched = tuple(table for search in self.searches for table in (search.points, search.layers, search.front))
        return (*self.ablations, *searched, *self.search_latencies, *self.tables, *self.layer_tables)


def content(results: Results) -> Content:
    """Arrange what was read."""
    results, aside = _newest(results)
    found = comparisons(results)
    measured = tuple(chart for number, one in enumerate(found) for chart in charted.measured_tradeoffs(one, number))
    energies = [energy for energy in results.energies if energy.layers]
    others = (
        tabulated.sensitivity_table(results), tabulated.view_table(results.views), tabulated.speed_table(results), tabulated.op_table(results),
        tabulated.expert_table(results),
    )  # fmt: skip
    return Content(
        results, found, tuple(ablation_table(one, number) for number, one in enumerate(found)), measured + charted.published_tradeoffs(),
        tuple(shown_search(one, number) for number, one in enumerate(results.searches)), search_latency_tables(results),
        charted.energy_totals(energies), tuple(charted.energy_by_layer(energy, number) for number, energy in enumerate(energies)),
        charted.share_charts(results), charted.curve_charts(results.curves), tuple(table for table in others if table is not None),
        tuple(tabulated.energy_table(energy, number) for number, energy in enumerate(energies)), aside,
    )  # fmt: skip


def _newest(results: Results) -> tuple[Results, tuple[Skipped, ...]]:
    """What counts, and by file the numbers that a newer file has too. Of view synthesis every number of a row has its own newest file, which
    its table finds."""
    energies, old_energies = _newest_of(results.energies, lambda e: (e.model, e.recipe, e.mode, e.setting), "energy of {1}")
    speeds, old_speeds = _newest_of(
        results.speeds, lambda s: (s.model, s.contender, s.batch, s.source.conditions.get("device")), "time of {1} at batch {2}"
    )
    runs, old_runs = _newest_of(results.runs, _same_run, "run of {1} with the same settings and seed")
    _, old_views = _newest_of(results.views, lambda v: (v.scene, v.row, v.psnr is None), "numbers of {1} on {0}")
    return replace(results, runs=runs, energies=energies, speeds=speeds), (*old_runs, *old_energies, *old_speeds, *old_views)


def _same_run(run: RunResult) -> tuple:
    """What two files of one run share: one without a seed is known by its answers."""
    images = (run.model, run.data, run.accuracy.images, run.accuracy.labels_digest)
    return images, run.recipe, run.variant, run.seed if run.seed is not None else f"{run.accuracy.right:x}"


def _newest_of(entries: list[Any], key: Callable[[Any], tuple], what: str) -> tuple[list[Any], list[Skipped]]:
    newest: dict[tuple, Any] = {}
    found: list[Skipped] = []
    for entry in sorted(entries, key=lambda entry: entry.source.time):
        older = newest.get(key(entry))
        newest[key(entry)] = entry
        if older is not None and older.source.path != entry.source.path:
            found.append(Skipped(older.source.path, f"{what.format(*key(entry))}: {entry.source.path} is newer"))
    return [entry for entry in entries if entry.source.path == newest[key(entry)].source.path], found


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
            Tile(f"{best.top1:.1f} %", f"with the best row whose attention adds instead of multiplying, “{best.label}”", "measured"),
        ]
        removed = [(run.removed, line.label) for line in converted for run in line.runs if run.removed is not None]
        if removed:
            made.append(Tile(f"{100 * max(removed)[0]:.0f} %", f"of the multiplications are gone in the row “{max(removed)[1]}”", "measured"))
        saved = [
            (1 - line.energy.mj_per_image / one.control.energy.mj_per_image, line.label) for line in converted if line.energy and one.control.energy
        ]
        if saved and max(saved)[0] > 0:
            made.append(
                Tile(
                    f"{100 * max(saved)[0]:.0f} %",
                    f"less energy than the dense model in the row “{max(saved)[1]}”, by the analytical model",
                    "modelled",
                )
            )
        return tuple(made)
    return ()
