"""Searches and measured times in the report: every number of a good file is where it belongs, and of a wrong one there is none."""

import csv
import io
import json
import re
from copy import deepcopy
from math import isfinite

import pytest
import report_files as files
import report_search_files as made
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.report import searched, write_report
from shiftaddvit.report.charts import Point, front
from shiftaddvit.report.contents import content
from shiftaddvit.report.labels import placed
from shiftaddvit.report.page import render
from shiftaddvit.report.reading import read_results
from shiftaddvit.report.tables import as_latex, as_markdown
from shiftaddvit.schema import VERSIONS, stamped


def read(tmp_path, *values):
    """What the report makes of these files."""
    for number, one in enumerate(values):
        files.put(tmp_path, f"{number}.json", one)
    return content(read_results([tmp_path]))


def rows_of(table):
    """Rows as (heading → cell), by their first cell."""
    return {row[0].text: dict(zip(table.headings(), row, strict=True)) for row in table.rows}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("dense", ("", "mult")), ("add+attn-moe", ("add", "moe")), ("mlp-shift", ("", "shift")), ("msa", ("msa", "mult")), ("attn-moe+add", None),
        ("add+linear", None), ("add+mlp-moe", None), ("mlp-shift+attn-shift", None), ("", None), ("sorcery", None),
    ],
)  # fmt: skip
def test_options_are_an_attention_and_who_computes_its_linears(option, expected):
    assert searched.parts(option) == expected


def test_the_answer_stands_beside_every_shipped_recipe(tmp_path):
    shown = read(tmp_path, made.search()).searches[0]
    rows = rows_of(shown.points)
    assert set(rows) == {"▸ found", "dense, as it was", *made.ROWS}
    answer = rows["▸ found"]
    assert answer["mJ (energy, modelled)"].value == 7.75 and answer["of dense, % (energy, modelled)"].value == 77.5
    assert answer["KL, nats (harm, predicted)"].value == 0.875 and answer["accuracy, points (harm, predicted)"].kind == "modelled"
    assert answer["accuracy, points (harm, measured)"].value == 1.5 and answer["accuracy, points (harm, measured)"].kind == "measured"
    assert answer["KL, nats (harm, measured)"].value == 0.75 and answer["layers changed"].text == "3 of 4"
    assert {rows[name]["KL, nats (harm, measured)"].kind for name in made.ROWS} == {"not run"}
    assert rows["ours-quant-moe"]["mJ (energy, modelled)"].value == 7.5 and rows["dense, as it was"]["mJ (energy, modelled)"].value == 10.0


def test_every_layer_says_what_it_becomes_costs_and_harms(tmp_path):
    shown = read(tmp_path, made.search()).searches[0]
    rows = rows_of(shown.layers)
    assert list(rows) == [f"stage {stage} · block 1, {kind}" for stage in (1, 2) for kind in ("attention", "MLP")]
    first = rows["stage 1 · block 1, attention"]
    assert (
        first["becomes (found)"].text == "shift" and first["energy, mJ (found)"].value == 1.25 and first["energy of dense, % (found)"].value == 62.5
    )
    assert first["KL, nats (found)"].value == 0.25 and first["ours-quant-moe (shipped recipes)"].text == "add + mixture"
    assert rows["stage 2 · block 1, attention"]["becomes (found)"].text == "as it is"
    squares = dict(shown.matrix.rows)["stage 1 · block 1, MLP"]
    assert shown.matrix.columns == ("found", "ours-quant-moe", "mlp-shift")
    assert [(square.text, square.kind) for square in squares] == [("× ≪", "moe"), ("× ≪", "moe"), ("≪", "shift")]


def test_the_front_is_drawn_with_what_was_measured(tmp_path):
    shown = read(tmp_path, made.search()).searches[0]
    harm, accuracy = shown.charts
    assert [series.name for series in harm.series] == ["Pareto front", "as it was, and shipped recipes", "found", "found, measured as a whole"]
    assert harm.less_is_better and [(p.x, p.y) for p in harm.series[0].points] == [(9.5, 0.125), (9.0, 0.25), (7.75, 0.875), (7.25, 1.25)]
    measured = accuracy.series[-1].points[0]
    assert (measured.x, measured.y, measured.low, measured.high) == (7.75, 1.5, 0.5, 2.5) and harm.series[-1].points[0].y == 0.75
    assert [row[0].value for row in shown.front.rows] == [1, 2, 3, 4]
    numbers = [tile.number for tile in shown.tiles]
    assert numbers == ["77.5 %", "−0.88", "−1.50", "3 of 4"]


def test_a_front_for_the_accuracy_has_one_chart(tmp_path):
    shown = read(tmp_path, made.search(damage="drop", minimised="drop")).searches[0]
    assert [chart.id for chart in shown.charts] == ["search-0-front"] and "accuracy loss" in shown.charts[0].y_label


def test_a_search_without_images_shows_no_measurement(tmp_path):
    shown = read(tmp_path, made.search(together=None)).searches[0]
    assert not any("measured" in column.group for column in shown.points.columns) and len(shown.charts[0].series) == 3
    assert "measured" not in shown.charts[0].sources and all(tile.kind != "measured" for tile in shown.tiles)


def test_a_budget_that_cannot_be_met_is_said(tmp_path):
    found = read(tmp_path, made.search(budgets=["energy ≤ 1 mJ"], met=False))
    text = render(found, "t")
    assert "This budget cannot be met" in text and "▸ nearest to the budget" in text and "▸ found" not in text


def test_files_from_before_stamps_are_read_only_in_their_certain_form(tmp_path):
    old = {key: value for key, value in made.search().items() if key not in ("shiftaddvit", "sites", "rest", "model", "data", "split")}
    found = read(tmp_path, old)
    assert not found.results.skipped and not found.results.sources[0].stamped and found.searches[0].result.found.totals["energy"] == 7.75
    assert "energy, mJ (found)" not in found.searches[0].layers.headings()
    for missing in ("front", "met", "identity"):
        folder = tmp_path / missing
        files.put(folder, "good.json", files.energy("dense"))
        files.put(folder, "old.json", {key: value for key, value in old.items() if key != missing})
        again = read_results([folder])
        assert not again.searches and not again.skipped, missing  # nobody's result


def test_the_repositorys_searches_are_read():
    folder = files.Path(__file__).parents[1] / "results" / "search" / "quickstart"
    found = read_results([folder])
    assert not found.skipped and len(found.searches) == 1 and found.searches[0].rows["msa"].totals["energy"] == pytest.approx(0.12556, abs=1e-4)


def test_what_the_search_command_writes_is_read(tmp_path):
    results = files.Path(__file__).parents[1] / "results" / "search" / "quickstart"
    dense = next((files.Path(__file__).parents[1] / "shiftaddvit" / "assets" / "quickstart").glob("*.safetensors"))
    arguments = ["search", str(dense), "--sensitivity", str(results / "sensitivity.json"), "--budget", "energy=0.8", "--no-figure", "--points", "5"]
    outcome = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "s")])
    assert outcome.exit_code == 0, outcome.output
    found = read_results([tmp_path / "s"])
    assert not found.skipped and {source.kind for source in found.sources} == {"search", "sensitivity"}
    one = found.searches[0]
    assert one.met and one.values.keys() == set(one.sites) and one.budgets == ("energy ≤ 0.8 of dense",)


def test_times_of_options_are_shown_under_one_name_for_attention_and_mlp(tmp_path):
    table = read(tmp_path, made.search_latency()).search_latencies[0]
    rows = rows_of(table)
    assert [column.title for column in table.columns] == ["layer", "as it is", "shift", "add", "add + mixture", "mixture"]
    assert rows["stage 1 · block 1, MLP"]["shift (µs, measured here)"].value == 10.0
    assert rows["stage 1 · block 1, attention"]["shift (µs, measured here)"].value == 12.5
    assert rows["everything else"]["as it is (µs, measured here)"].value == 7.5 and "a test" in table.notes[0]


def experts(found):
    return next(table for table in found.tables if table.id == "experts")


def test_times_of_experts_are_microseconds_by_shape_and_device(tmp_path):
    table = experts(read(tmp_path, made.expert_latency()))
    row = rows_of(table)["linear 64 → 256"]
    assert row["multiplication expert, µs"].value == pytest.approx(200) and row["shift expert, µs"].value == pytest.approx(50)
    assert row["shift / multiplication"].value == pytest.approx(0.25) and row["device"].text == "a test, 1 thread"
    assert row["tokens that should shift, %"].value == pytest.approx(80)  # 1/50 of 1/50 + 1/200
    assert row["multiplication expert, µs"].kind == "measured" and "stages.0.blocks.0.mlp.fc1" in row["layer, features"].note
    assert "MLP 64 → 256 → 64" in rows_of(table)


def test_several_experts_of_a_kind_are_all_shown(tmp_path):
    table = experts(read(tmp_path, made.expert_latency(made.expert_row(experts=["mult", "shift", "shift"], seconds=[1e-4, 5e-5, 1e-4]))))
    row = rows_of(table)["linear 64 → 256"]
    assert row["shift expert, µs"].text == "50.0 / 100.0" and row["tokens that should shift, %"].value == pytest.approx(75)


def test_the_newest_time_of_a_layer_counts_and_another_device_is_another_row(tmp_path):
    def at(time, seconds, **more):
        return made.expert_latency(made.expert_row(seconds=seconds, conditions=files.CONDITIONS | {"time": time}, **more))

    new, old = at("2026-12-01T00:00:00+00:00", [3e-4, 1e-4]), at("2026-11-01T00:00:00+00:00", [9e-4, 9e-4])
    table = experts(read(tmp_path, new, old, at("2026-11-01T00:00:00+00:00", [8e-4, 8e-4], device="another")))
    assert [(row[3].value, row[7].text) for row in table.rows] == [(pytest.approx(300), "a test, 1 thread"), (pytest.approx(800), "another")]
    assert any("set aside" in note for note in table.notes)


def test_a_cache_from_before_stamps_is_read(tmp_path):
    found = read(tmp_path, {made.OLD_KEY: [2e-4, 5e-5], made.OLD_KEY.replace("linear 64->256", "mlp 8->32->8"): [1e-4, 1e-4]})
    assert not found.results.skipped and not found.results.sources[0].stamped
    row = rows_of(experts(found))["linear 64 → 256"]
    assert row["multiplication expert, µs"].value == pytest.approx(200) and row["device"].text == "cpu x2" and row["tokens"].value == 3136


def test_older_files_that_do_not_count_are_named(tmp_path):
    older = files.energy("dense", conditions=files.CONDITIONS | {"time": "2020-01-01T00:00:00+00:00"})
    found = read(tmp_path, older, files.energy("dense"))
    assert [entry.path.endswith("0.json") and "1.json is newer" in entry.reason for entry in found.aside] == [True]
    assert "1 number is set aside" in render(found, "t")


def test_a_file_of_every_kind_is_read_and_shown(tmp_path):
    found = content(read_results([made.everything(tmp_path / "all")]))
    assert {source.kind for source in found.results.sources} == set(VERSIONS)
    for table in found.all_tables:
        assert as_latex(table).isascii(), table.id  # what every LaTeX sets
    assert [entry.path for entry in found.results.skipped] == ["all/half.json", "all/ours-quant-linear/log.jsonl"]
    text = render(found, "t")
    for anchor in (
        "regions",
        "ablation",
        "tradeoffs",
        "search",
        "energy",
        "shares",
        "training",
        "sensitivity",
        "view-synthesis",
        "speed",
        "ops",
        "experts",
    ):
        assert f'<section id="{anchor}">' in text and f'<a href="#{anchor}">' in text, anchor
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def changed(path, value, base=made.search):
    """A stamped file with one entry replaced, or taken out where the value is None."""
    values = deepcopy(base())
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    if value is None:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return stamped(values["shiftaddvit"]["kind"], values)


LAYER = made.SITES[0]
WRONG = {
    "search cut short": (json.dumps(made.search())[:900], "is not whole JSON"),
    "search with NaN": (json.dumps(made.search()).replace("7.75", "NaN"), "holds NaN"),
    "search edited by hand": (made.search() | {"met": False}, "digest no longer fits"),
    "search of a later version": (made.search() | {"shiftaddvit": {"kind": "search", "version": 2, "digest": ""}}, "version 2 of 'search'"),
    "no front": (changed(["front"], []), "'front' has no points"),
    "front missing": (changed(["front"], None), "front is missing"),
    "front out of order": (changed(["front"], [made.point(choice) for choice in reversed(made.FRONT)]), "does not trade energy for kl"),
    "total is a text": (changed(["found", "totals", "energy"], "7.75"), "found.totals.energy must be a number"),
    "total is negative": (changed(["found", "totals", "energy"], -1.0), "must be from 0"),
    "total is not its layers": (changed(["sites", 0, "here", "energy"], 1.0), "found.totals.energy says 7.75, but the rest of the file gives 7.5"),
    "harm is not its layers": (changed(["sites", 0, "here", "drop"], 0.0), "found.totals.drop says 0.875"),
    "dense total is not its layers": (changed(["sites", 0, "dense", "energy"], 3.0), "dense.totals.energy says 10"),
    "layers missing": (changed(["sites"], made.search()["sites"][:-1]), "'sites' and 'identity' name other layers"),
    "a layer becomes something else": (changed(["sites", 0, "becomes"], "add"), "'found' says 'attn-shift'"),
    "one choice with two totals": (changed(["front", 2, "totals", "loss"], 9.0), "a choice that is there twice"),
    "dense harms": (changed(["dense", "totals", "kl"], 0.5), "'dense' must change nothing and harm nothing"),
    "an unknown option": (changed(["rows", "mlp-shift", "choice", made.SITES[1]], "mlp-sorcery"), "is no option of a search"),
    "a layer of another network": (changed(["rows", "mlp-shift", "choice", "blocks.7.mlp"], "mlp-shift"), "none of the network's attentions and MLPs"),
    "an attention that becomes an MLP": (changed(["rows", "mlp-shift", "choice", LAYER], "mlp-shift"), "takes options of an attention and of an MLP"),
    "another recipe": (changed(["recipe", "overrides", 0, "attn_linear"], "moe"), "not the choice that 'found' has"),
    "a recipe that changes more": (changed(["recipe", "mlp"], "shift"), "changes more than the layers"),
    "over its budget": (changed(["budgets"], ["energy ≤ 0.7 of dense"]), "'found' is over energy ≤ 0.7 of dense"),
    "a budget in another unit": (changed(["budgets"], ["energy ≤ 300 µs"]), "is no budget of this search"),
    "a budget that is met and is said not to be": (changed(["met"], False), "cannot be met, but 'found' meets them"),
    "another unit": (changed(["units", "energy"], "J"), "units.energy must be mJ"),
    "a measured drop outside its interval": (changed(["together", "drop"], 3.0), "with 'drop' between them"),
    "a measured accuracy over 100": (changed(["together", "top1"], 101.0), "must be from 0 to 100"),
    "a damage that there is not": (changed(["damage"], "energy"), "'damage' must be one of kl, loss, drop"),
    "a cost that it has not": (changed(["cost"], "latency"), "of which the totals say nothing"),
    "experts cut short": (json.dumps(made.expert_latency())[:300], "is not whole JSON"),
    "experts edited by hand": (made.expert_latency() | {"rows": [made.expert_row(seconds=[1e-6, 1e-6])]}, "digest no longer fits"),
    "a time of zero": (made.expert_latency(made.expert_row(seconds=[2e-4, 0.0])), "numbers above 0"),
    "a negative time": (made.expert_latency(made.expert_row(seconds=[2e-4, -1.0])), "must be from 0"),
    "a time is a text": (made.expert_latency(made.expert_row(seconds=[2e-4, "fast"])), "must be a number, is 'fast'"),
    "a time too few": (made.expert_latency(made.expert_row(seconds=[2e-4])), "must be 2 numbers"),
    "an unknown expert": (made.expert_latency(made.expert_row(experts=["mult", "guess"])), "two or more of 'mult' and 'shift'"),
    "a shape of another layer": (made.expert_latency(made.expert_row(shape=[64, 256, 64])), "'shape' of a linear must be 2"),
    "no tokens": (made.expert_latency(made.expert_row(tokens=0)), "tokens must be a whole number of at least 1"),
    "no device": (made.expert_latency(made.expert_row(device=" ")), "does not say what it is"),
    "two rows of one layer": (made.expert_latency(made.expert_row(), made.expert_row(seconds=[1.0, 1.0])), "two rows of the same layer"),
    "no rows": (stamped("expert-latency", {"rows": []}), "has no rows"),
    "an old cache with a strange key": ({made.OLD_KEY: [1.0, 1.0], "cpu | linear 64->": [1.0, 1.0]}, "names no layer, tokens and device"),
    "an old cache with half a value": ({made.OLD_KEY: [1.0]}, "must be 2 numbers"),
    "an old cache with a text": ({made.OLD_KEY: "1.0"}, "must be a list"),
    "a table of energies": (changed(["quantity"], "energy", made.search_latency), "holds energy in µs"),
    "a time of nothing": (changed(["costs", LAYER, "add"], 0.0, made.search_latency), f"costs.{LAYER}.add is 0"),
    "an option that is none": (changed(["costs", LAYER, "sorcery"], 1.0, made.search_latency), "no option that a search times"),
    "no time of the dense form": (changed(["costs", LAYER, "dense"], None, made.search_latency), "lacks the dense form"),
    "layers of another network in the times": (changed(["costs", LAYER], None, made.search_latency), "name other layers"),
    "no word on the device": (changed(["conditions"], {}, made.search_latency), "conditions.device is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_and_nothing_of_it_is_shown(case, tmp_path):
    values, reason = WRONG[case]
    files.put(tmp_path, "good.json", files.energy("dense"))
    (tmp_path / "wrong.json").write_text(values if isinstance(values, str) else json.dumps(values))
    found = content(read_results([tmp_path]))
    assert [reason in entry.reason and entry.path.endswith("wrong.json") for entry in found.results.skipped] == [True], found.results.skipped
    assert not (found.searches or found.search_latencies or found.results.expert_times) and len(found.results.energies) == 1
    page = render(found, "t")
    assert "1 file is not shown" in page and "wrong.json" in page and 'id="search"' not in page and 'id="experts"' not in page


def leaves(value, path=()):
    """Every place in a file."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        if key != "shiftaddvit":
            yield from leaves(one, (*path, key))


@pytest.mark.parametrize("make", [made.search, made.search_latency, made.expert_latency])
def test_nothing_that_a_file_may_hold_makes_the_report_fail(make, tmp_path):
    files.put(tmp_path, "good.json", files.energy("dense"))
    for path in leaves(make()):
        for value in (None, "x", -1, [], {}, 1e308, True):
            files.put(tmp_path, "odd.json", changed(path, value, make))
            found = content(read_results([tmp_path]))
            cells = [cell for table in found.all_tables for row in table.rows for cell in row]
            assert all(cell.value is None or isfinite(cell.value) for cell in cells), (path, value)


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }}$x_1$|=1+1"


def test_texts_of_searches_and_times_stay_texts(tmp_path):
    evil = made.search(model={"name": EVIL}, rows={EVIL: made.point(made.ROWS["mlp-shift"])}, data=EVIL, split=EVIL)
    times = made.expert_latency(made.expert_row(device=EVIL, mixtures=[EVIL]))
    latencies = made.search_latency(conditions=files.CONDITIONS | {"device": EVIL})
    for number, one in enumerate((evil, times, latencies)):
        files.put(tmp_path, f"{number}.json", one)
    target = tmp_path / "page.html"
    written = write_report([tmp_path], target)
    text = target.read_text()
    assert not written.skipped and "<img" not in text and "document.title='owned'</script>" not in text and text.count("<script") == 2


def test_the_search_comes_as_figures_and_tables_for_papers(tmp_path):
    pytest.importorskip("matplotlib")
    import xml.etree.ElementTree

    folder = tmp_path / "in"
    for name, one in (("s", made.search()), ("l", made.search_latency()), ("e", made.expert_latency())):
        files.put(folder, f"{name}.json", one)
    written = {path.name: path for path in write_report([folder], tmp_path / "r.html", figures=tmp_path / "out").figures}
    for name in ("search-0-front", "search-0-accuracy", "search-0-choice"):
        assert xml.etree.ElementTree.parse(written[f"{name}.svg"]).getroot().tag.endswith("svg") and written[f"{name}.png"].stat().st_size > 5000
    for name in ("search-0", "search-0-layers", "search-0-front-points", "search-latency-0", "experts"):
        assert {f"{name}.md", f"{name}.tex", f"{name}.csv"} <= written.keys()
    rows = list(csv.DictReader(io.StringIO(written["search-0.csv"].read_text())))
    assert rows[0]["mJ (energy, modelled)"] == "7.75" and rows[0]["mJ (energy, modelled): source"] == "modelled"
    assert rows[0]["accuracy, points (harm, measured): source"] == "measured"
    times = list(csv.DictReader(io.StringIO(written["experts.csv"].read_text())))
    assert float(times[0]["shift expert, µs"]) == pytest.approx(50) and times[0]["shift expert, µs: source"] == "measured"
    table = read(tmp_path / "again", made.search()).searches[0].points
    assert r"7.75$^\mathrm{E}$" in as_latex(table) and "7.75 (E)" in as_markdown(table) and "1.50 (M)" in as_markdown(table)


def test_less_of_both_is_a_front_too():
    points = tuple(Point(x, y, "") for x, y in ((1, 5), (2, 3), (3, 3), (3, 1), (4, 2), (0.5, 6)))
    assert [(p.x, p.y) for p in front(points, less_is_better=True)] == [(0.5, 6), (1, 5), (2, 3), (3, 1)]


def test_labels_cover_neither_marks_nor_one_another():
    marks = [(50.0 + 9 * i, 50.0 + 5 * (i % 3), f"label {i}") for i in range(12)]
    em = 6.0
    found = placed(marks, [mark[:2] for mark in marks], (0.0, 0.0, 400.0, 120.0), em)
    boxes = [(x, y - 1.5 * em, x + em * len(text), y + 0.4 * em) for x, y, text in found]
    assert len(boxes) >= 3
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= 400 and bottom <= 120
        assert not any(left < x < right and top < y < bottom for x, y, _ in marks)
        assert not any(left < r and l_ < right and top < b and t < bottom for l_, t, r, b in boxes[:number])
