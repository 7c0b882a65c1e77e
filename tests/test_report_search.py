"""Searches and measured times in the report: every number of a good file is where it belongs, and of a wrong one there is none."""

import csv
import io
import re

import pytest
import report_files as files
import report_search_files as made
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.report import searched, write_report
from shiftaddvit.report.contents import content
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
    assert len(found.results.energies) == len(found.energy_layers) == len(found.layer_tables) == 1, "nor are they drawn"


def test_an_older_time_is_neither_shown_nor_the_best(tmp_path):
    """Also where it was the shorter one."""
    older, newer = files.engine(), files.engine()
    older["conditions"] = older["conditions"] | {"time": "2020-01-01T00:00:00+00:00"}
    older["rows"][0] |= {"median_us": 250.0, "low_us": 245.0, "high_us": 260.0, "images_per_s": 4000.0}
    found = read(tmp_path, stamped("engine-bench", older), newer)
    (table,) = [table for table in found.tables if table.id == "speed"]
    assert len(table.rows) == len(newer["rows"]) and [row[3].value for row in table.rows][0] == 500.0
    assert len(found.aside) == len(newer["rows"]) and len(found.results.sources) == 2, "both files are still listed"


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
