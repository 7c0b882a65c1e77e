"""Benchmarks: a training step is timed by the product's own loop, a wrong one has no time, and slower results are flagged."""

import json
import multiprocessing
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from typer.testing import CliRunner

from shiftaddvit.bench import TrainPlan, bench_training, is_wrong, regressions
from shiftaddvit.bench import train as training
from shiftaddvit.cli.main import app
from shiftaddvit.engine import bench_cpu
from shiftaddvit.errors import UserError
from shiftaddvit.ops import bench as ops_bench
from shiftaddvit.ops.bench_cases import Case
from shiftaddvit.ops.timing import Timing, failure_noted
from shiftaddvit.report.fields import Fields
from shiftaddvit.report.kinds import READERS
from shiftaddvit.report.results import Results
from shiftaddvit.report.sources import Source

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
    *right, compiled = bench_training(plan, show=lambda line: None)["rows"]
    assert [row["mode"] for row in right] == ["eager", "graphed", "attention"]
    assert all("median_us" in row and not is_wrong(row) for row in right)
    assert is_wrong(compiled) and compiled["status"].startswith("wrong") and "median_us" not in compiled


def test_percentiles_of_two_steps_lie_between_them(monkeypatch):
    monkeypatch.setattr(training, "finetune", lambda *args, **kwargs: list(args[1]))
    monkeypatch.setattr(training, "read_log", lambda path: [{"event": "step", "loss": 2.0}])
    monkeypatch.setattr(training.TimedBatches, "step_us", lambda self, warmup: [10.0, 1000.0])
    (row,) = bench_training(TrainPlan(**(vars(TINY) | {"recipes": ("dense",)})), show=lambda line: None)["rows"]
    assert 10 <= row["low_us"] <= row["median_us"] <= row["high_us"] <= 1000


def test_nothing_is_measured_after_the_budget():
    result = bench_training(TrainPlan(models=TINY.models, recipes=("dense",), minutes=-1.0), show=lambda line: None)
    assert [row["status"] for row in result["rows"]] == ["not run: out of time"] * len(training.MODES)
    assert not any(is_wrong(row) for row in result["rows"])


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


def test_memory_that_ends_is_told_with_what_to_try():
    row: dict = {}
    with failure_noted(row):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert row["status"] == "failed: out of memory, try a smaller batch" and is_wrong(row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "pvt_v2_b9"], "did you mean 'pvt_v2_b5'"), (["model", "pvt_v2_b9", "--device", "cpu"], "did you mean 'pvt_v2_b5'"),
        (["train", "--precision", "fp8"], "precision must be 'no', 'fp16' or 'bf16'"),
        (["train", "--recipe", "our-quant-moe"], "'shiftaddvit recipes' lists them all"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(training, "_measure", lambda *_: pytest.fail("measured"))
    outcome = CliRunner().invoke(app, ["bench", *arguments])
    assert outcome.exit_code == 2 and message in outcome.stderr and outcome.stderr.count("\n") == 1


def test_ops_are_kept_case_by_case_and_a_failure_costs_one_row(monkeypatch):
    def refuses(x):
        raise RuntimeError("does not fit")

    def cases(batches):
        contenders = {"ours": torch.neg, "refuses": refuses, "wrong": torch.abs}
        return (Case("op", str(batch), lambda: (torch.ones(4),), torch.neg, contenders, 1, 1) for batch in batches)

    for name, value in (
        ("CASES", {"op": cases}), ("ceilings", lambda device: {"bytes_per_s": 1e12, "bf16_flop_per_s": 1e15}),
        ("conditions", lambda *_, **more: more), ("time_call", lambda *_: Timing(1.0, 1.0, 1.0, 1, 1)),
    ):  # fmt: skip
        monkeypatch.setattr(ops_bench, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kept, lines = [], []
    result = ops_bench.bench_ops(batches=(1, 2), show=lines.append, keep=lambda found: kept.append(len(found["rows"])))
    assert kept == [3, 6]
    ours, failed, wrong = result["rows"][:3]
    assert "median_us" in ours and is_wrong(failed) and failed["status"] == "failed: RuntimeError: does not fit" and wrong["error"] == 2 and "median_us" not in wrong
    assert "does not fit" in lines[2] and "WRONG" in lines[3]


# Single ops


@pytest.mark.parametrize(("result", "status"), [(2.0, "measured"), (2.1, "wrong"), (float("nan"), "wrong")])
def test_an_op_with_a_wrong_result_has_no_time(result: float, status: str, monkeypatch):
    monkeypatch.setattr(ops_bench, "time_call", lambda call, inputs: Timing(3.0, 2.0, 4.0, 15, 20))
    case = Case("double", "1", lambda: (torch.ones(1),), lambda x: 2 * x, {"ours": lambda x: result * x}, bytes=8, flop=1)
    shown: list[str] = []
    (row,) = ops_bench.measure(case, {"bytes_per_s": 1e12, "bf16_flop_per_s": 1e12}, True, shown.append)
    assert row["status"] == status and is_wrong(row) == (status == "wrong")
    assert ("median_us" in row) == (status == "measured") and ("WRONG" in shown[0]) == (status == "wrong")


# Whole models on a CPU


class Answers:
    """Stands for the process of a contender that has `error` and takes `milliseconds`."""

    def __init__(self, contender: bench_cpu.Contender, status: str, error: float, milliseconds: float):
        self.answer, self.found, self.times = None, {"dtype": contender.dtype, "status": status, "error": error}, (milliseconds, 2 * milliseconds)

    def send(self, word: str) -> None:
        self.answer = self.found | {"seconds_to_first_result": 1.0, "top1_agreement": 1.0} if word == "start" else self.times

    def recv(self):
        return self.answer


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`shiftaddvit bench model --device cpu` with contenders that answer as told; its outcome and the result it wrote."""

    def run(status: str, milliseconds: float = 5.0, *more: str):
        @contextmanager
        def workers(name, batch, plan, contenders):
            yield {one: Answers(one, status if str(one) == "engine dense" else "measured", 1e-6, milliseconds) for one in contenders}

        monkeypatch.setattr(bench_cpu, "_workers", workers)
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        outcome = CliRunner().invoke(app, ["bench", "model", "--device", "cpu", "--batch", "2", "--quick", "--json", str(file), *more])
        return outcome, json.loads(file.read_text()), file

    return run


def test_right_contenders_on_a_cpu_are_not_called_wrong(bench):
    outcome, result, _ = bench("measured")
    assert outcome.exit_code == 0, outcome.output
    assert not any(is_wrong(row) for row in result["rows"]) and "wrong" not in outcome.output


def test_a_dense_engine_that_is_asked_for_is_measured_once(bench):
    _, result, _ = bench("measured", 5.0, "--recipe", "dense", "--recipe", "mlp-shift")
    engines = [row["contender"] for row in result["rows"] if row["contender"].startswith("engine") and row["dtype"] == "float32"]
    assert engines == ["engine mlp-shift", "engine dense"]


def test_a_wrong_contender_on_a_cpu_ends_with_3(bench):
    outcome, result, _ = bench("wrong")
    assert outcome.exit_code == 3 and outcome.stderr.endswith("1 wrong or failed, 0 slower\n")
    assert [row["contender"] for row in result["rows"] if is_wrong(row)] == ["engine dense"]


def test_a_slower_result_of_a_cpu_is_flagged(bench):
    _, result, stored = bench("measured", 5.0)
    outcome, _, _ = bench("measured", 6.0, "--against", str(stored))
    assert outcome.exit_code == 3 and f"0 wrong or failed, {len(result['rows'])} slower" in outcome.stderr
    assert "pvt_v2_b0 batch 2 engine dense float32: 5000.0 → 6000.0 µs (+20%)" in outcome.stderr


def test_a_report_reads_the_result_of_a_cpu(bench):
    _, result, _ = bench("wrong", 5.0)
    found = Results()
    READERS["engine-bench"](Fields(result), Source("cpu.json", "engine-bench", "", "", {}, True, ()), found)
    times = {speed.contender: (speed.median_us, speed.images_per_s) for speed in found.speeds}
    assert times["timm eager"] == (5000.0, 400.0) and times["engine dense"] == (None, None)


def test_the_process_of_a_contender_ends_by_itself():
    # One that is killed leaves its named semaphores behind.
    before = multiprocessing.active_children()
    with bench_cpu._workers("pvt_v2_b0", 1, bench_cpu.CpuPlan(threads=1), [bench_cpu.BASELINE]):
        (process,) = set(multiprocessing.active_children()) - set(before)
    assert process.exitcode == 0
