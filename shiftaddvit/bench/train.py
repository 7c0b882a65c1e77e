"""Time and memory of a training step: the product's own loop (`finetune`) on random images, dense and converted.

`eager` launches every kernel of every step; `graphed` records a step and replays it (`cuda_graph`); `compiled` does the same
with `torch.compile`, `attention` compiles converted attention alone. Without a GPU `graphed` is `eager`.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.ops.timing import failure_noted
from shiftaddvit.reparam import recipes, reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.train import FinetuneConfig, StageConfig, finetune
from shiftaddvit.train.run_folder import read_log

MODES = ("eager", "graphed", "attention", "compiled")
"""Ways to run the same step."""
SAME_LOSS = 0.02
"""All modes must reach the same loss after the same steps, to this share of it."""


@dataclass(frozen=True)
class TrainPlan:
    """What to measure."""

    models: tuple[str, ...] = ("pvt_v2_b0",)
    """Names in timm's registry, and PVTv1's."""
    recipes: tuple[str, ...] = ("dense", "ours-quant-add", "ours-quant-shift", "ours-quant-moe")
    """`dense` first: the others are compared with it."""
    modes: tuple[str, ...] = MODES
    """The first is what the losses of the others are compared with."""
    batch: int = 256
    """Images a step."""
    image_size: int = 224
    """Pixels of a side."""
    precision: str = "bf16"
    """no, fp16 or bf16."""
    steps: int = 30
    """Timed steps."""
    warmup: int = 12
    """Steps before them, compilation included."""
    minutes: float = 8.0
    """Budget; what comes after it is not run."""
    seed: int = 0
    """Of weights and images."""

    def __post_init__(self) -> None:
        for name in ("batch", "image_size", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for mode in self.modes:
            if mode not in MODES:
                raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.config("eager")

    def config(self, mode: str) -> FinetuneConfig:
        """How a row trains: one stage that ends with the last batch. UserError for a precision that there is not."""
        how = {"compiled": True, "attention": "attention"}.get(mode, False)
        return FinetuneConfig(
            stages=(StageConfig("all", 1, lr=1e-5, warmup_epochs=0),), precision=self.precision, compile=how,
            cuda_graph=mode != "eager", evaluate_every=0,
            log_every=self.warmup + self.steps, checkpoint_minutes=1e6, cost="equal", seed=self.seed,
        )  # fmt: skip


class TimedBatches:
    """The same random batch again and again; notes when each is asked for, which is when the step before it has been launched."""

    def __init__(self, plan: TrainPlan, classes: int, device: torch.device):
        generator = torch.Generator().manual_seed(plan.seed)
        images = torch.randn(plan.batch, 3, plan.image_size, plan.image_size, generator=generator)
        self.batch = images.to(device), torch.randint(classes, (plan.batch,), generator=generator).to(device)
        self.length, self.device, self.batch_size = plan.warmup + plan.steps, device, plan.batch
        self.marks: list[Any] = []
        self.first_step_s = math.nan

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Calibration may look at the first batch before training asks for it.
        self.marks.clear()
        began = time.perf_counter()
        for number in range(self.length):
            if number == 1:
                self._wait()
                self.first_step_s = time.perf_counter() - began
            self.marks.append(self._mark())
            yield self.batch
        self.marks.append(self._mark())

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step_us(self, warmup: int) -> list[float]:
        """Microseconds of each step after the first `warmup`."""
        self._wait()
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[warmup:]
        return [1e3 * a.elapsed_time(b) if self.device.type == "cuda" else 1e6 * (b - a) for a, b in pairs]


def bench_training(plan: TrainPlan, show: Callable[[str], None] = print, keep: Callable[[dict], None] = lambda result: None) -> dict:
    """Measure and return a JSON-able dict: conditions and one row for each model, recipe and mode.

    A row has the step's median and tenth and ninetieth percentiles in µs, images/s, the peak of the device's memory in bytes (GPU only),
    seconds until the first step was done, the loss after the last, and time and memory relative to the dense model in the same mode.
    `keep` gets the result so far after every row.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict] = []
    result = {"kind": "bench-train", "conditions": conditions(device, **asdict(plan)), "rows": rows}
    end = time.monotonic() + 60 * plan.minutes
    for name in plan.models:
        for recipe in plan.recipes:
            for mode in plan.modes:
                row = {"model": name, "recipe": recipe, "mode": mode, "batch": plan.batch, "status": "not run: out of time"}
                if time.monotonic() < end:
                    with failure_noted(row):
                        row |= _measure(name, recipe, mode, plan, device)
                rows.append(row)
                _check(rows)
                _compare(rows)
                show(_line(rows[-1]))
                keep(result)
    return result


def _measure(name: str, recipe: str, mode: str, plan: TrainPlan, device: torch.device) -> dict:
    model = _model(name, recipe, plan)
    batches = TimedBatches(plan, model.num_classes, device)
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, batches, None, plan.config(mode), output=Path(folder) / "run", show=False)
        losses = [event["loss"] for event in read_log(Path(folder) / "run" / "log.jsonl") if event["event"] == "step"]
    times = batches.step_us(plan.warmup)
    tenths = quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "status": "measured", "median_us": median(times), "low_us": tenths[0], "high_us": tenths[-1], "steps": len(times),
        "images_per_s": plan.batch / median(times) * 1e6, "first_step_s": batches.first_step_s, "peak_bytes": peak, "loss": losses[-1],
    }  # fmt: skip


def _model(name: str, recipe: str, plan: TrainPlan) -> nn.Module:
    torch.manual_seed(plan.seed)
    sized = {} if name.startswith("pvt_v2") else {"img_size": plan.image_size}
    model = create_model(name, sized)
    return model if recipe == "dense" else reparameterize(model, recipes[recipe])


def _check(rows: list[dict]) -> None:
    """The last row keeps its time only if its loss is that of the same recipe in the mode measured first."""
    last = rows[-1]
    for row in rows[:-1]:
        same = (row["model"], row["recipe"]) == (last["model"], last["recipe"])
        if same and "loss" in row and "loss" in last and abs(last["loss"] - row["loss"]) > SAME_LOSS * abs(row["loss"]):
            last["status"] = f"wrong: loss {last['loss']:.4f}, {row['mode']} {row['loss']:.4f}"
            for field in ("median_us", "low_us", "high_us", "images_per_s"):
                last.pop(field, None)


def _compare(rows: list[dict]) -> None:
    """The last row's time and memory against the dense model's in the same mode."""
    last = rows[-1]
    for row in rows[:-1]:
        if (row["model"], row["mode"], row["recipe"]) == (last["model"], last["mode"], "dense") and "median_us" in row and "median_us" in last:
            last["time_against_dense"] = last["median_us"] / row["median_us"]
            if row["peak_bytes"]:
                last["memory_against_dense"] = last["peak_bytes"] / row["peak_bytes"]


def _line(row: dict) -> str:
    head = f"{row['model']:12s}{row['recipe']:24s}{row['mode']:10s}"
    if "median_us" not in row:
        return f"{head}{row['status']}"
    line = f"{head}{row['median_us'] / 1e3:9.2f} ms [{row['low_us'] / 1e3:.2f} … {row['high_us'] / 1e3:.2f}]  {row['images_per_s']:8.0f} images/s"
    line += f"  first step {row['first_step_s']:.0f} s"
    if row["peak_bytes"]:
        line += f"  {row['peak_bytes'] / 2**30:.2f} GiB"
    if "time_against_dense" in row:
        line += f"  {row['time_against_dense']:.2f}× dense"
    return line + (f", {row['memory_against_dense']:.2f}× its memory" if "memory_against_dense" in row else "")
