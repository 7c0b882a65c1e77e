"""The report: what it reads, what it makes of several files together, and what its command says."""

import json
import re

import pytest
import report_files as files
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.errors import UserError
from shiftaddvit.published import classification, view_synthesis
from shiftaddvit.report import reading
from shiftaddvit.report.ablation import comparisons, table
from shiftaddvit.report.contents import content
from shiftaddvit.report.kinds import READERS
from shiftaddvit.report.reading import read_results
from shiftaddvit.report.tables import NOT_RUN
from shiftaddvit.schema import VERSIONS, digest, stamped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.results(tmp_path_factory.mktemp("results"))


def reasons(found):
    return [entry.reason for entry in found.skipped]


def test_every_kind_has_a_reader():
    assert set(READERS) == set(VERSIONS)


def test_a_stamp_survives_json_and_changes_with_any_number():
    values = {"a": [1, 2.5, (3, 4)], "b": {"c": None}}
    written = json.loads(json.dumps(stamped("energy", values)))
    assert digest(written) == written["shiftaddvit"]["digest"] == digest(written | {"note": "mine"})
    assert digest(written | {"a": [1, 2.5, [3, 4.0001]]}) != written["shiftaddvit"]["digest"]


def test_a_folder_is_read_whole(folder):
    found = read_results([folder])
    assert reasons(found) == ["1 line of the log cut short or damaged, left out"]
    assert (len(found.runs), len(found.energies), len(found.speeds), len(found.views), len(found.dispatches), len(found.curves)) == (4, 2, 2, 1, 1, 1)


def test_results_of_the_repository_are_read():
    found = read_results([files.Path(__file__).parents[1] / "results" / "tiny_imagenet" / "pvt_v2_b0-dense-s0.json"])
    assert [(run.model.name, run.recipe, run.accuracy.top1) for run in found.runs] == [("pvt_v2_b0", "dense", 55.93)] and found.sources[0].stamped


def test_a_link_to_elsewhere_is_read_under_its_own_name(folder, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked.json").symlink_to(folder / "dispatch.json")
    assert [source.path for source in read_results([tmp_path / "runs"]).sources] == ["runs/linked.json"]


def test_what_the_energy_command_writes_is_read(tmp_path):
    for name, arguments in (("one", ["--recipe", "ours-quant-moe"]), ("compare", ["--compare", "ours-quant-shift"])):
        outcome = CliRunner().invoke(app, ["energy", "pvt_v2_b0", "--image-size", "64", *arguments, "--json", str(tmp_path / f"{name}.json")])
        assert outcome.exit_code == 0, outcome.output
    found = read_results([tmp_path])
    assert not found.skipped and {e.recipe for e in found.energies} == {"ours-quant-moe", "ours-quant-shift", "msa", "pvt", "ecoformer"}
    assert {e.model.size for e in found.energies} == {(64, 64)} and all(source.stamped for source in found.sources)


def test_the_same_file_under_two_names_counts_once(tmp_path):
    for name in ("a.json", "b.json"):
        files.put(tmp_path, name, files.energy("dense"))
    assert len(read_results([tmp_path]).energies) == 1


@pytest.mark.parametrize("stamp", [True, False])
def test_the_digest_of_a_file_is_computed_once(tmp_path, monkeypatch, stamp):
    computed = []
    monkeypatch.setattr(reading, "digest", lambda values: computed.append(digest(values)) or computed[-1])
    values = files.energy("dense")
    files.put(tmp_path, "a.json", values if stamp else {key: value for key, value in values.items() if key != "shiftaddvit"})
    source = read_results([tmp_path]).sources[0]
    assert computed == [source.digest] and source.stamped == stamp


def test_a_run_that_has_not_finished_shows_its_curve_alone(tmp_path):
    files.log(tmp_path, "going", finished=False)
    found = read_results([tmp_path])
    assert [curve.finished for curve in found.curves] == [False] and not found.runs
    assert any("no result yet" in reason for reason in reasons(found))


def test_epochs_of_a_curve_run_on_through_the_stages(folder):
    curve = read_results([folder]).curves[0]
    assert [x for x, _ in curve.loss] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4] and curve.loss[-1][1] == pytest.approx(1.9)


def test_other_json_is_passed_over_in_a_folder_and_refused_when_named(tmp_path):
    files.put(tmp_path, "a.json", files.energy("dense"))
    other = files.put(tmp_path, "transforms.json", {"frames": []})
    assert not read_results([tmp_path]).skipped
    with pytest.raises(UserError, match="is no result file"):
        read_results([other])
    with pytest.raises(UserError, match="does not exist"):
        read_results([tmp_path / "nowhere"])


def cell_of(found, recipe, title, group="measured here"):
    made = table(found, 0)
    row = next(row for row, line in zip(made.rows, found.lines, strict=True) if line.recipe == recipe)
    return next(cell for cell, column in zip(row, made.columns, strict=True) if (column.title, column.group) == (title, group))


def test_a_cell_is_the_mean_over_the_seeds_and_pairs_with_the_control(folder):
    found = comparisons(read_results([folder]))[0]
    cell = cell_of(found, "ours-quant-moe", "top-1 %")
    assert cell.value == pytest.approx(76) and cell.kind == "measured" and "2 runs" in cell.note
    assert cell_of(found, "ours-quant-moe", "vs dense, points").value == pytest.approx(100 * ((150 + 154) / 2 - 160) / 200)
    assert cell_of(found, "dense", "vs dense, points").text == "control"
    assert cell_of(found, "ecoformer", "top-1 %") == NOT_RUN


def test_a_change_of_settings_is_another_row(tmp_path):
    files.put(tmp_path, "pvt_v2_b0-ours-quant-moe-s0.json", files.finetune(150, {"name": "ours-quant-moe"}))
    files.put(tmp_path, "pvt_v2_b0-noisy-s0.json", files.finetune(100, {"name": "ours-quant-moe", "moe": {"noise": False}}))
    lines = [line for line in comparisons(read_results([tmp_path]))[0].lines if line.runs]
    assert [line.top1 for line in lines] in ([75, 50], [50, 75]) and len({line.label for line in lines}) == 2


def test_copies_of_one_run_count_once(tmp_path):
    for number, name in enumerate(("one", "two", "three")):
        later = files.CONDITIONS | {"time": f"2026-11-0{number + 1}T10:00:00+00:00"}
        seen = files.evaluation(150) | {"conditions": later}
        files.put(tmp_path, f"{name}/result.json", files.finetune(150, {"name": "msa"}, conditions=later, evaluation=seen))
    made = content(read_results([tmp_path]))
    assert cell_of(made.comparisons[0], "msa", "top-1 %").text == "75.00"
    assert sorted(file.path for file in made.aside) == [f"{tmp_path.name}/one/result.json", f"{tmp_path.name}/two/result.json"]


def test_runs_of_other_batch_sizes_are_rows_of_their_own(tmp_path):
    for right, size in ((150, 32), (160, 64)):
        files.put(tmp_path, f"batch-{size}/result.json", files.finetune(right, {"name": "msa"}, loading={"batch_size": size}))
    lines = [line for line in comparisons(read_results([tmp_path]))[0].lines if line.runs]
    assert [line.top1 for line in lines] == [75, 80] and ["batch-32" in lines[0].label, "batch-64" in lines[1].label] == [True, True]


def test_plus_or_minus_means_one_thing_and_the_page_says_which(folder):
    found = comparisons(read_results([folder]))[0]
    assert "±" in cell_of(found, "ours-quant-moe", "top-1 %").text
    difference = cell_of(found, "ours-quant-moe", "vs dense, points").text
    assert "±" not in difference and re.fullmatch(r"[+−][\d.]+ \([+−][\d.]+ … [+−][\d.]+\)", difference)
    notes = [note for note in table(found, 0).notes if "±" in note]
    assert len(notes) == 1 and "standard deviation" in notes[0]


def test_other_images_under_the_same_name_are_another_table(tmp_path):
    files.put(tmp_path, "a.json", files.finetune(150, None))
    dev = files.evaluation(80, 100) | {"labels_digest": "of other images"}
    files.put(tmp_path, "b.json", stamped("finetune", files.finetune(150, {"name": "msa"}) | {"evaluation": dev}))
    measured = [[line.top1 for line in one.lines if line.runs] for one in comparisons(read_results([tmp_path]))]
    assert measured == [[75], [80], [], []]


def test_published_and_measured_are_columns_of_their_own(folder):
    for number, found in enumerate(comparisons(read_results([folder]))):
        made = table(found, number)
        for column, cells_ in zip(made.columns, zip(*made.rows, strict=True), strict=True):
            kinds = {cell.kind for cell in cells_}
            allowed = {
                "published": {"published", "none"},
                "measured here": {"measured", "not run", "none", "text"},
                "modelled here": {"modelled", "not run"},
            }
            assert kinds <= allowed.get(column.group, {"text"}), (made.title, column)


def test_other_networks_sizes_and_data_get_no_published_numbers(folder):
    first, *others = comparisons(read_results([folder]))
    assert not first.published and "published" not in {column.group for column in table(first, 0).columns}
    assert [one.subject.model.name for one in others if one.published] == ["pvt_v2_b0", "pvt_tiny"]


def test_a_time_at_another_image_size_is_not_shown_beside_an_accuracy(folder):
    tiny, b0, _ = comparisons(read_results([folder]))
    assert all(line.speed is None for line in tiny.lines) and all(line.energy is None for line in b0.lines)
    assert cell_of(b0, "ours-quant-moe", "latency, ms").value == pytest.approx(0.5)


def test_a_recipes_time_is_in_half_precision_where_there_is_one(tmp_path):
    half = files.engine()["rows"][0]
    full = half | {"contender": "engine ours-quant-moe", "median_us": 900.0, "low_us": 890.0, "high_us": 920.0, "images_per_s": 1e6 / 900}
    for rows, expected in (([half, full], {500.0}), ([full], {900.0})):
        (tmp_path / "speed.json").write_text(json.dumps(stamped("engine-bench", files.engine() | {"rows": rows})))
        found = read_results([tmp_path])
        assert {speed.median_us for speed in found.speeds if speed.recipe == "ours-quant-moe"} == expected
        assert len(found.speeds) == len(rows)


def test_a_column_of_energies_has_one_setting_of_the_accelerator(tmp_path):
    files.put(tmp_path, "dense.json", files.finetune(150, None))
    usual = files.energy("dense")["settings"] | {"units": "45nm", "bits": {"activation": 16, "shift_weight": None}}
    other = usual | {"bits": {"activation": 8, "shift_weight": None}}
    files.put(tmp_path, "a.json", files.energy("dense", settings=usual))
    files.put(tmp_path, "b.json", files.energy("msa", settings=usual))
    files.put(tmp_path, "c.json", files.energy("ours-quant-shift", settings=usual | {"bits": {"activation": 16, "shift_weight": 5}}))
    files.put(
        tmp_path, "d.json", files.energy("dense", settings=other, conditions=files.CONDITIONS | {"time": "2030-01-01T00:00:00+00:00"}, layers=7)
    )
    files.put(tmp_path, "e.json", files.energy("ours-quant-moe", settings=other))
    found = content(read_results([tmp_path]))
    lines = {line.recipe: line.energy for line in found.comparisons[0].lines}
    assert {recipe: energy.mj_per_image for recipe, energy in lines.items() if energy} == pytest.approx(
        dict.fromkeys(("dense", "msa", "ours-quant-shift"), 0.027)
    )
    titles = [chart.title for chart in found.energy_totals]
    assert len(titles) == 2 and "'activation': 16" in titles[0] and "'activation': 8" in titles[1]


def test_published_numbers_are_the_papers():
    rows = {row.recipe: row.results for row in classification()}
    assert len(rows) == 13 and rows["ours-quant-moe"]["pvt_v2_b0"].top1 == 70.59 and rows["ours-quant-moe"]["pvt_v2_b0"].energy_mj == 27.13
    assert rows["ecoformer"]["pvt_tiny"].top1 is None and rows["ecoformer"]["pvt_tiny"].diverged
    assert {row.row: row.quality["llff"][0] for row in view_synthesis()}["gnt"] == 27.24


def test_the_command_says_what_it_wrote_and_left_out(folder, tmp_path):
    target = tmp_path / "r.html"
    outcome = CliRunner().invoke(app, ["report", str(folder), "--output", str(target)])
    assert outcome.exit_code == 0 and "9 result files" in outcome.output and "cut short" in outcome.output and target.stat().st_size < 1e6
    again = CliRunner().invoke(app, ["report", str(folder), "--output", str(target)])
    assert again.exit_code == 2 and "exists already" in again.output
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--output", str(tmp_path / "n.html")])
    assert nothing.exit_code == 2 and "does not exist" in nothing.output and not (tmp_path / "n.html").exists()
