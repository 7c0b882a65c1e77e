"""Files that the report refuses, each in one particular, and that nothing which a file may hold makes it fail."""

import json
from copy import deepcopy
from html import unescape
from math import isfinite

import pytest
import report_files as files
import report_search_files as made

from shiftaddvit.report.contents import content
from shiftaddvit.report.page import render
from shiftaddvit.report.reading import read_results
from shiftaddvit.schema import stamped


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
    read = found.results
    assert [reason in entry.reason and entry.path.endswith("wrong.json") for entry in read.skipped] == [True], read.skipped
    assert len(read.sources) == 1 and len(read.energies) == 1
    assert not (read.runs or read.views or read.speeds or read.dispatches or read.searches or read.search_latencies or read.expert_times)
    page = unescape(render(found, "t"))
    assert "1 file is not shown" in page and f"<code>{read.skipped[0].path}</code> {read.skipped[0].reason}</li>" in page
    assert 'id="search"' not in page and 'id="experts"' not in page


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
