"""The report: what it reads, what it refuses to show, and that the page is whole, closed and safe."""

import csv
import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
import report_files as files
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.errors import UserError
from shiftaddvit.published import classification, view_synthesis
from shiftaddvit.report import write_report
from shiftaddvit.report.ablation import comparisons, table
from shiftaddvit.report.charts import Point, front, ticks
from shiftaddvit.report.kinds import READERS
from shiftaddvit.report.maps import block_and_linear, cells, choice_table
from shiftaddvit.report.contents import content
from shiftaddvit.report.page import render
from shiftaddvit.report.reading import read_results
from shiftaddvit.report.tables import NOT_RUN, Cell, Column, Table, as_csv, as_latex, as_markdown, words
from shiftaddvit.schema import VERSIONS, digest, stamped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def html(folder):
    return render(content(read_results([folder])), "A test")


class Page(HTMLParser):
    """Every element with its attributes, and the text of those that matter."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self.stack = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        if self.stack:
            self.texts.setdefault(self.stack[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


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
    assert [(run.model.name, run.recipe, run.accuracy.top1) for run in found.runs] == [("pvt_v2_b0", "dense", 55.34)] and not found.sources[0].stamped


def test_the_page_says_nothing_of_the_folders_above(folder, html):
    assert str(folder.parent) not in html and f"{folder.name}/dispatch.json" in html


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


def edited(values, **changes):
    return values | changes


WRONG = {
    "half-written": ('{"shiftaddvit": {"kind": "ener', "is not whole JSON"),
    "nan": ('{"total_mj": NaN, "per_layer": [], "settings": {}}', "holds NaN"),
    "later version": (files.energy("msa") | {"shiftaddvit": {"kind": "energy", "version": 2, "digest": ""}}, "version 2 of 'energy'; this version reads 1"),
    "unknown kind": (files.energy("msa") | {"shiftaddvit": {"kind": "horoscope", "version": 1}}, "of kind 'horoscope', which this version does not know"),
    "edited by hand": (files.energy("msa") | {"total_mj": 1.0}, "digest no longer fits"),
    "accuracy is not its bits": (stamped("finetune", files.finetune(150, None) | {"evaluation": files.evaluation(150) | {"top1": 99.0}}), "top1 says 99, but the rest of the file gives 75"),
    "bits are too few": (stamped("finetune", files.finetune(150, None) | {"evaluation": files.evaluation(150) | {"images": 210}}), "210 images need 27"),
    "interval of another count": (stamped("finetune", files.finetune(150, None) | {"evaluation": files.evaluation(150) | {"interval95": [1.0, 2.0]}}), "interval95 says 1"),
    "energy is not its layers": (stamped("energy", files.energy("msa") | {"total_mj": 1.0}), "total_mj says 1"),
    "a number is a text": (stamped("energy", files.energy("msa") | {"total_mj": "1.0"}), "total_mj must be a number"),
    "negative energy": (stamped("energy", files.energy("msa") | {"total_mj": -1.0}), "total_mj is -1, must be from 0"),
    "tokens off the grid": (stamped("dispatch", files.dispatch() | {"pictures": [files.dispatch()["pictures"][0] | {"experts": {"stages.0.blocks.0.mlp.fc1": "01", "stages.1.blocks.0.attn.qkv": "10110"}}]}), "needs 16 digits of 01"),
    "an expert that is not there": (stamped("dispatch", files.dispatch() | {"pictures": [files.dispatch()["pictures"][0] | {"experts": {"stages.0.blocks.0.mlp.fc1": "0110000011111112", "stages.1.blocks.0.attn.qkv": "10110"}}]}), "needs 16 digits of 01"),
    "a picture that could hold a script": (stamped("dispatch", files.dispatch() | {"pictures": [files.dispatch()["pictures"][0] | {"image": "data:image/svg+xml;base64,AAAA"}]}), "must be a PNG, JPEG or WebP"),
    "a mean that is not one": (stamped("nvs-evaluate", files.view("gnt") | {"psnr": 30.0}), "psnr says 30"),
    "a median outside its percentiles": (stamped("engine-bench", files.engine() | {"rows": [files.engine()["rows"][0] | {"median_us": 600.0}]}), "outside its own percentiles"),
    "a row is no object": (stamped("quickstart", {"rows": [1], "seed": 0}), "rows[0] must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_and_nothing_of_it_is_shown(case, tmp_path):
    values, reason = WRONG[case]
    files.put(tmp_path, "good.json", files.energy("dense"))
    (tmp_path / "wrong.json").write_text(values if isinstance(values, str) else json.dumps(values))
    found = read_results([tmp_path])
    assert len(found.skipped) == 1 and reason in found.skipped[0].reason and found.skipped[0].path.endswith("wrong.json")
    assert len(found.sources) == 1 and len(found.energies) == 1 and not (found.runs or found.views or found.speeds or found.dispatches)
    text = Page(render(content(found), "t")).texts
    assert any("wrong.json" in code for code in text["code"]) and any(reason.replace("'", "")[:12] in item.replace("'", "") for item in text["li"])


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


def test_the_front_is_what_no_point_beats():
    points = tuple(Point(x, y, "") for x, y in ((1, 1), (2, 3), (3, 2), (4, 5), (4, 4), (0.5, 0)))
    assert [(p.x, p.y) for p in front(points)] == [(0.5, 0), (1, 1), (2, 3), (4, 5)]


def test_ticks_are_round_and_inside():
    assert ticks(0.3, 10.2) == [2, 4, 6, 8, 10] and ticks(70.1, 70.4) == pytest.approx([70.1, 70.2, 70.3, 70.4])


def test_maps_cover_every_token_once(folder):
    one = read_results([folder]).dispatches[0]
    for mixture in one.mixtures:
        digits = one.pictures[0].experts[mixture.name]
        covered = []
        for kind in ("mult", "shift"):
            for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", cells(mixture, digits, kind)):
                covered += [(int(row), int(column) + step, kind) for step in range(int(width))]
        rows, columns = mixture.grid
        expected = [(r, c, mixture.experts[int(digits[mixture.prefix + r * columns + c])]) for r in range(rows) for c in range(columns)]
        assert sorted(covered) == sorted(expected)


def test_module_names_become_words(folder):
    assert block_and_linear("stages.1.blocks.0.attn.qkv") == ("stage 2 · block 1", "q, k, v")
    assert block_and_linear("blocks.11.mlp") == ("block 12", "MLP")
    made = choice_table(read_results([folder]).dispatches[0])
    assert made.columns == ("q, k, v", "MLP in") and made.rows[0][1][0] is None and made.rows[0][1][1].percent == 75


def test_the_page_is_one_file_that_loads_and_runs_nothing_else(html):
    page = Page(html)
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        for name in ("src", "href", "xlink:href", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:image/")), (tag, attrs)
    assert [attrs.get("type") for attrs in page.all("script")] == ["application/json", None]
    assert not {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for text in (page.texts["style"][0], page.texts["script"][-1]):
        assert b64encode(sha256(text.encode()).digest()).decode() in policy


def test_the_page_has_every_section_and_every_link_has_a_target(html):
    page = Page(html)
    there = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {"regions", "ablation", "tradeoffs", "energy", "shares", "training", "view-synthesis", "speed", "files"} <= there
    assert {attrs["href"][1:] for attrs in page.all("a")} <= there
    assert {attrs["href"][1:] for attrs in page.all("use")} <= there
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_everything_can_be_reached_and_is_named(html):
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en" and page.all("main")
    for svg in page.all("svg"):
        assert svg.get("aria-labelledby") or svg.get("aria-label") or svg.get("aria-hidden") == "true"
    marks = [attrs for attrs in page.all("g") if "mark" in attrs.get("class", "")]
    assert marks and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in marks)
    for made in page.all("textarea"):
        assert made["aria-label"]


def test_kinds_of_cells_differ_in_more_than_colour(html):
    for kind, mark in (("published", "P"), ("measured", "M"), ("modelled", "E")):
        assert re.search(rf'<td class="{kind}[^>]*>[^<]*<sup[^>]*>{mark}</sup>', html)
    assert re.search(r'<td class="not-run[^>]*>not run</td>', html)


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"{{ 7*7 }}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    files.put(folder, "a.json", files.finetune(150, {"name": EVIL}, data=EVIL))
    files.put(folder, "b.json", files.finetune(140, None, data=EVIL))
    files.put(folder, "c.json", stamped("dispatch", files.dispatch(EVIL) | {"model": {"name": EVIL}}) | {"data": EVIL})
    evil_layer = [{"name": EVIL, "kind": EVIL, "primitive": EVIL, "levels": {"dram": 1e6}, "total_pj": 1e6}]
    files.put(folder, "d.json", stamped("energy", files.energy(EVIL) | {"per_layer": evil_layer, "total_mj": 1e-3}))
    files.put(folder, "e.json", files.view(EVIL))
    layer = files.dispatch()["layers"][0] | {"name": EVIL}
    picture = files.dispatch()["pictures"][0] | {"experts": {EVIL: "0110000011111111"}}
    files.put(folder, "h.json", stamped("dispatch", files.dispatch() | {"layers": [layer], "pictures": [picture]}))
    files.put(folder, "f.json", {"shiftaddvit": {"kind": EVIL, "version": EVIL}})
    pictures = [files.dispatch()["pictures"][0] | {"name": EVIL, "label": EVIL, "predicted": EVIL}]
    files.put(folder, "g.json", stamped("dispatch", files.dispatch() | {"pictures": pictures}))
    files.log(folder, "run<b>", finished=False)
    target = folder / "page.html"
    write_report([folder], target, title=EVIL)
    return target


def test_texts_of_files_never_become_elements(hostile):
    page = Page(hostile.read_text())
    assert [attrs.get("type") for attrs in page.all("script")] == ["application/json", None]
    assert not page.all("img") and not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert EVIL in "".join(page.texts["title"]) and "49" not in "".join(page.texts["title"])
    assert "</script" not in page.texts["script"][0]


TRICKY = Table(
    "t",
    "a_b & c",
    (Column("row", "", False), Column("top-1 %", "measured")),
    ((words("x|y_1 <b>"), Cell("measured", "1.50", 1.5)), (words("=1+1"), NOT_RUN)),
)


def test_tables_escape_what_each_language_needs():
    assert "| x\\|y_1 &lt;b> | 1.50 (M) |" in as_markdown(TRICKY)
    latex = as_latex(TRICKY)
    assert r"a\_b \& c" in latex and r"x|y\_1" in latex and latex.count(r"\\") == 4
    rows = list(csv.reader(io.StringIO(as_csv(TRICKY))))
    assert rows[1:] == [["x|y_1 <b>", "1.5", "measured"], ["'=1+1", "", "not run"]]


def test_figures_and_tables_for_papers(folder, tmp_path):
    pytest.importorskip("matplotlib")
    import xml.etree.ElementTree

    written = write_report([folder / "dispatch.json", folder / "energy" / "dense.json"], tmp_path / "r.html", figures=tmp_path / "out")
    names = {path.name for path in written.figures}
    assert {
        "regions-0.svg",
        "regions-0.png",
        "energy-0.svg",
        "shares-0.png",
        "published-latency.svg",
        "ablation-0.tex",
        "ablation-0.md",
        "ablation-0.csv",
    } <= names
    for path in written.figures:
        assert path.stat().st_size > 100
        if path.suffix == ".svg":
            xml.etree.ElementTree.parse(path)


def test_the_command_says_what_it_wrote_and_left_out(folder, tmp_path):
    target = tmp_path / "r.html"
    outcome = CliRunner().invoke(app, ["report", str(folder), "--output", str(target)])
    assert outcome.exit_code == 0 and "9 result files" in outcome.output and "cut short" in outcome.output and target.stat().st_size < 1e6
    again = CliRunner().invoke(app, ["report", str(folder), "--output", str(target)])
    assert again.exit_code == 2 and "exists already" in again.output
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--output", str(tmp_path / "n.html")])
    assert nothing.exit_code == 2 and "does not exist" in nothing.output and not (tmp_path / "n.html").exists()
