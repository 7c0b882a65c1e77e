"""The report's page: it is whole, closed, safe and can be read by everybody; its charts and tables, there and for papers."""

import csv
import io
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
import report_files as files

from shiftaddvit.report import write_report
from shiftaddvit.report.charts import Point, front, ticks
from shiftaddvit.report.contents import content
from shiftaddvit.report.labels import placed
from shiftaddvit.report.maps import block_and_linear, cells, choice_table
from shiftaddvit.report.page import render
from shiftaddvit.report.reading import read_results
from shiftaddvit.report.tables import NOT_RUN, Cell, Column, Table, as_csv, as_latex, as_markdown, words
from shiftaddvit.schema import stamped


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


def test_the_page_says_nothing_of_the_folders_above(folder, html):
    assert str(folder.parent) not in html and f"{folder.name}/dispatch.json" in html


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


def test_the_front_is_what_no_point_beats():
    points = tuple(Point(x, y, "") for x, y in ((1, 1), (2, 3), (3, 2), (4, 5), (4, 4), (0.5, 0)))
    assert [(p.x, p.y) for p in front(points)] == [(0.5, 0), (1, 1), (2, 3), (4, 5)]


def test_less_of_both_is_a_front_too():
    points = tuple(Point(x, y, "") for x, y in ((1, 5), (2, 3), (3, 3), (3, 1), (4, 2), (0.5, 6)))
    assert [(p.x, p.y) for p in front(points, less_is_better=True)] == [(0.5, 6), (1, 5), (2, 3), (3, 1)]


def test_ticks_are_round_and_inside():
    assert ticks(0.3, 10.2) == [2, 4, 6, 8, 10] and ticks(70.1, 70.4) == pytest.approx([70.1, 70.2, 70.3, 70.4])


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
