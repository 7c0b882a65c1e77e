"""Benchmarks: a training step is timed by the product's own loop, a wrong one has no time, and slower results are flagged."""

from copy import deepcopy

import pytest
import torch

from shiftaddvit.bench import TrainPlan, bench_training, regressions
from shiftaddvit.bench import train as training
from shiftaddvit.errors import UserError
from shiftaddvit.ops.timing import failure_noted

TINY = TrainPlan(models=("deit_tiny_patch16_224",), recipes=("dense", "ours-quant-moe"), modes=("eager",), batch=1, image_size=32, precision="no", steps=2, warmup=1)


def test_training_is_measured_against_the_dense_model(monkeypatch):
    kept = []
    result = bench_training(TINY, show=lambda line: None, keep=lambda found: kept.append(len(found["rows"])))
    dense, moe = result["rows"]
    assert kept == [1, 2]
    assert dense["status"] == moe["status"] == "measured"
    assert dense["steps"] == 2 and 0 < dense["low_us"] <= dense["median_us"] <= dense["high_us"]
    assert moe["time_against_dense"] == moe["median_us"] / dense["median_us"]
    assert "time_against_dense" not in dense


def test_a_mode_with_another_loss_has_no_time(monkeypatch):
    real = training._measure

    def shifted(name, recipe, mode, plan, device):
        row = real(name, recipe, mode, plan, device)
        return row | {"loss": row["loss"] * (1.1 if mode == "compiled" else 1.0)}

    monkeypatch.setattr(training, "finetune", lambda *args, **kwargs: list(args[1]))
    monkeypatch.setattr(training, "read_log", lambda path: [{"event": "step", "loss": 2.0}])
    monkeypatch.setattr(training, "_measure", shifted)
    plan = TrainPlan(models=TINY.models, recipes=("dense",), batch=1, image_size=32, precision="no", steps=2, warmup=1)
    eager, compiled = bench_training(plan, show=lambda line: None)["rows"]
    assert "median_us" in eager
    assert compiled["status"].startswith("wrong") and "median_us" not in compiled


def test_nothing_is_measured_after_the_budget():
    result = bench_training(TrainPlan(models=TINY.models, recipes=("dense",), minutes=-1.0), show=lambda line: None)
    assert [row["status"] for row in result["rows"]] == ["not run: out of time"] * 2


@pytest.mark.parametrize("changes", [{"batch": 0}, {"modes": ("fast",)}, {"steps": 0}])
def test_wrong_plans_are_named(changes):
    with pytest.raises(UserError, match=next(iter(changes)).rstrip("s")):
        TrainPlan(**changes)


STORED = {
    "conditions": {"device": "NVIDIA H100"},
    "rows": [
        {"model": "pvt_v2_b0", "batch": 1, "contender": "engine", "status": "measured", "median_us": 100.0, "low_us": 99.0, "high_us": 102.0},
        {"model": "pvt_v2_b0", "batch": 32, "contender": "engine", "status": "measured", "median_us": 300.0, "low_us": 290.0, "high_us": 400.0},
        {"model": "pvt_v2_b1", "batch": 1, "contender": "engine", "status": "measured", "median_us": 150.0, "low_us": 149.0, "high_us": 151.0},
    ],
}


def changed(number: int, **values) -> dict:
    result = deepcopy(STORED)
    result["rows"][number] |= values
    return result


def test_an_equal_or_faster_result_is_no_regression():
    assert regressions(STORED, STORED) == []
    assert regressions(changed(0, median_us=50.0, low_us=49.0), STORED) == []


def test_a_slower_row_is_flagged_with_its_numbers():
    (found,) = regressions(changed(0, median_us=120.0, low_us=118.0), STORED)
    assert str(found) == "pvt_v2_b0 batch 1 engine: 100.0 → 120.0 µs (+20%)"


def test_a_row_inside_the_spread_is_not_flagged():
    assert regressions(changed(1, median_us=390.0, low_us=380.0), STORED) == []


def test_a_row_that_became_wrong_is_flagged():
    result = deepcopy(STORED)
    result["rows"][0] = {"model": "pvt_v2_b0", "batch": 1, "contender": "engine", "status": "wrong"}
    (found,) = regressions(result, STORED)
    assert "no right result" in str(found)


def test_rows_that_were_not_run_are_left_alone():
    result = deepcopy(STORED)
    result["rows"] = result["rows"][:1] + [{"model": "pvt_v2_b0", "batch": 32, "contender": "engine", "status": "not run: out of time"}]
    assert regressions(result, STORED) == []


def test_results_of_different_devices_are_not_compared():
    with pytest.raises(UserError, match="different devices"):
        regressions(STORED | {"conditions": {"device": "NVIDIA A100"}}, STORED)
    with pytest.raises(UserError, match="no benchmark result"):
        regressions(STORED, {"rows": 3})


def test_a_look_at_the_first_batch_is_no_step():
    batches = training.TimedBatches(TINY, 10, torch.device("cpu"))
    next(iter(batches))
    assert len(list(batches)) == 3
    assert len(batches.step_us(warmup=1)) == 2


def test_a_contender_that_fails_costs_only_its_own_row(monkeypatch):
    real = training._measure

    def broken(name, recipe, mode, plan, device):
        if recipe == "dense":
            raise RuntimeError("no kernel\nfor this")
        return real(name, recipe, mode, plan, device)

    monkeypatch.setattr(training, "_measure", broken)
    dense, moe = bench_training(TINY, show=lambda line: None)["rows"]
    assert dense["status"] == "failed: RuntimeError: no kernel" and "median_us" not in dense
    assert moe["status"] == "measured" and "time_against_dense" not in moe


def test_what_kernels_raise_is_noted_and_mistakes_in_code_are_not():
    from triton.runtime.errors import OutOfResources

    row: dict = {}
    with failure_noted(row):
        raise OutOfResources(300_000, 232_448, "shared memory")
    assert row["status"].startswith("failed: OutOfResources: out of resource: shared memory")
    with pytest.raises(AttributeError), failure_noted(row):
        raise AttributeError("a misspelt name")


def test_ops_are_kept_case_by_case_and_a_failure_costs_one_row(monkeypatch):
    from shiftaddvit.ops import bench as ops
    from shiftaddvit.ops.bench_cases import Case
    from shiftaddvit.ops.timing import Timing

    def refuses(x):
        raise RuntimeError("does not fit")

    def cases(batches):
        contenders = {"ours": torch.neg, "refuses": refuses, "wrong": torch.abs}
        return (Case("op", str(batch), lambda: (torch.ones(4),), torch.neg, contenders, 1, 1) for batch in batches)

    for name, value in (
        ("CASES", {"op": cases}), ("ceilings", lambda device: {"bytes_per_s": 1e12, "bf16_flop_per_s": 1e15}),
        ("conditions", lambda *_, **more: more), ("time_call", lambda *_: Timing(1.0, 1.0, 1.0, 1, 1)),
    ):  # fmt: skip
        monkeypatch.setattr(ops, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kept, lines = [], []
    result = ops.bench_ops(batches=(1, 2), show=lines.append, keep=lambda found: kept.append(len(found["rows"])))
    assert kept == [3, 6]
    ours, failed, wrong = result["rows"][:3]
    assert "median_us" in ours and failed["status"] == "failed: RuntimeError: does not fit" and wrong["error"] == 2 and "median_us" not in wrong
    assert "does not fit" in lines[2] and "WRONG" in lines[3]
