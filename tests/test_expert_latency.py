"""Measured times of experts: steady ones are cached, others hold for one run."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from train_runs import TWO_STAGES, loader, model

from shiftaddvit.files import write_json
from shiftaddvit.layers import MoELinear
from shiftaddvit.schema import stamped, was_changed
from shiftaddvit.train import finetune, latency
from shiftaddvit.train.latency import measure_expert_latency, set_expert_costs


class Clock:
    """Stands in for the timer: each expert's times in turn, the last one for good."""

    def __init__(self, *times: list[float]):
        self.times, self.order, self.calls, self.alive = times, {}, {}, []

    def __call__(self, expert, example):
        expert(example)
        self.alive.append(expert)  # so that no other gets its id
        number = self.order.setdefault(id(expert), len(self.order) % len(self.times))
        at = self.calls[id(expert)] = self.calls.get(id(expert), -1) + 1
        mine = self.times[number]
        return mine[min(at, len(mine) - 1)]


@pytest.fixture
def quiet_machine(monkeypatch):
    monkeypatch.setattr(latency, "_cpu_timer", Clock([2e-3], [1e-3]))


def test_a_scheduler_slice_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_cpu_timer", Clock([14e-3, 3e-4, 14e-3, 3e-4], [14e-3] * 19 + [2e-4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs = measure_expert_latency(model("mlp-moe"), torch.randn(1, 3, 32, 32), tmp_path / "latency.json")
    assert set(map(tuple, costs.values())) == {(3e-4, 2e-4)}
    assert all(row["steady"] for row in json.loads((tmp_path / "latency.json").read_text())["rows"])


def test_unsteady_times_are_used_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock = Clock([3e-4], [1e-3 * 1.1**i for i in range(100)][::-1])  # faster with every call: no quarter agrees
    monkeypatch.setattr(latency, "_cpu_timer", clock)
    with pytest.warns(UserWarning, match="unsteady"):
        finetune(model("mlp-moe"), loader(), None, replace(TWO_STAGES, cost="latency"), output=tmp_path / "run", show=False)
    assert set(clock.calls.values()) == {latency.ATTEMPTS * latency.REPEATS - 1}, "measured again, but not for ever"
    assert not latency.default_cache().exists()
    rows = json.loads((tmp_path / "run" / "latency.json").read_text())["rows"]
    assert rows and all(row["steady"] is False and "unsteady" in row["conditions"]["timed"] for row in rows)
    assert "unsteady" in (tmp_path / "run" / "log.jsonl").read_text()


def test_latency_is_measured_once_a_shape_and_cached(tmp_path, quiet_machine):
    built, images = model(), torch.randn(2, 3, 32, 32)
    cache = tmp_path / "latency.json"
    costs = measure_expert_latency(built, images, cache)
    assert set(costs) == {name for name, module in built.named_modules() if isinstance(module, MoELinear)}
    assert all(len(values) == 2 and min(values) > 0 for values in costs.values())
    rows = json.loads(cache.read_text())["rows"]
    assert len(rows) == 4 and all(row["experts"] == ["mult", "shift"] and "thread" in row["device"] for row in rows)
    write_json(cache, stamped("expert-latency", {"rows": [row | {"seconds": [3.0, 1.0]} for row in rows]}))
    costs = measure_expert_latency(built, images, cache)
    assert all(values == [3.0, 1.0] for values in costs.values())
    set_expert_costs(built, costs)
    assert built.blocks[0].mlp.fc1.latency.tolist() == [0.75, 0.25]
    assert measure_expert_latency(built, torch.randn(1, 3, 32, 32), cache) != costs  # another number of tokens


def test_a_latency_of_another_device_is_not_taken(tmp_path, quiet_machine):
    built, images, cache = model("mlp-moe"), torch.randn(1, 3, 32, 32), tmp_path / "latency.json"
    measure_expert_latency(built, images, cache)
    rows = json.loads(cache.read_text())["rows"]
    write_json(cache, stamped("expert-latency", {"rows": [row | {"seconds": [3.0, 1.0], "device": "another machine"} for row in rows]}))
    assert all(values != [3.0, 1.0] for values in measure_expert_latency(built, images, cache).values())
    assert len(json.loads(cache.read_text())["rows"]) == 2 * len(rows)


ROW = {"device": "x", "layer": "mlp", "shape": [8, 8, 8], "experts": ["mult", "shift"], "tokens": 1, "dtype": "float32", "seconds": [3.0, 1.0],
       "steady": True}  # fmt: skip


@pytest.mark.parametrize("content", [
    "{", "[1, 2]", "", json.dumps({"cpu x2 | linear 8->8 mult/shift | tokens 4 | torch.float32": [3.0, 1.0]}),
    json.dumps(stamped("expert-latency", {"rows": []}) | {"rows": [ROW]}), json.dumps(stamped("search-latency", {"rows": [ROW]})),
    json.dumps({"shiftaddvit": 1, "rows": [ROW]}),
], ids=["half", "list", "empty", "older", "edited", "other kind", "no stamp"])  # fmt: skip
def test_a_latency_cache_that_is_none_of_ours_is_measured_again(content, tmp_path, quiet_machine):
    (tmp_path / "latency.json").write_text(content)
    assert measure_expert_latency(model("mlp-moe"), torch.randn(1, 3, 32, 32), tmp_path / "latency.json")
    assert all(row["device"] != "x" for row in json.loads((tmp_path / "latency.json").read_text())["rows"])


def test_a_run_keeps_the_latencies_that_its_balance_loss_weighs_by(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = model()
    finetune(built, loader(), None, replace(TWO_STAGES, cost="latency"), output=tmp_path / "run", show=False)
    kept = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert not was_changed(kept) and kept["shiftaddvit"]["kind"] == "expert-latency"
    mixtures = {name: row["seconds"] for row in kept["rows"] for name in row["mixtures"]}
    assert set(mixtures) == {name for name, module in built.named_modules() if isinstance(module, MoELinear)}
    for name, seconds in mixtures.items():
        expected = torch.tensor(seconds, dtype=torch.float32) / sum(seconds)
        assert torch.allclose(built.get_submodule(name).latency, expected), name
    finetune(model("mlp-shift"), loader(), None, TWO_STAGES, output=tmp_path / "run", overwrite=True, show=False)
    assert not (tmp_path / "run" / "latency.json").exists(), "of the run that was replaced"


def test_a_cache_that_cannot_be_written_does_not_stop_training(tmp_path, quiet_machine):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        assert measure_expert_latency(model("mlp-moe"), torch.randn(1, 3, 32, 32), tmp_path / "file" / "latency.json")
