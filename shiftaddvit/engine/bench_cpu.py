"""Measure whole models on a CPU (`shiftaddvit bench model --device cpu`). Correct first, then timed.

Every contender has a process of its own, so that none profits from another's memory or threads, and they take turns: what else the
machine does hits all alike, and a ratio is the median over turns of two times measured side by side, with quartiles. Beside the wall
clock stands the time that the process used its processors: on a busy machine, with one thread, the steadier number.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Literal

import timm
import torch
from torch import Tensor, nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1 with timm)
from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError

from .bench_subjects import converted
from .cpu.memory import keep_freed_memory
from .cpu.onednn import onednn
from .deploy import deploy

TOLERANCE = 1e-4
"""Largest error of a logit over the largest logit, of the median image. Codes and routes are decisions: a value within rounding of its
threshold may fall on either side, so single images may differ by more, up to `WORST`."""
WORST = 0.1
"""Of every image."""
LEAST_TOLERANCE = 1e-2
"""In bfloat16: the error in 2-norm over all logits that is always allowed; otherwise twice that of the same model under autocast."""
SECONDS_TO_END = 5.0
"""A contender's process may take so long to end by itself."""


@dataclass(frozen=True)
class CpuPlan:
    """What to measure."""

    models: tuple[str, ...] = ("pvt_v2_b0",)
    """Names in timm's registry."""
    recipes: tuple[str, ...] = ("ours-quant-moe", "ours-quant-shift")
    """Converted forms of each model, besides the dense one."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    threads: int = 2
    """Of torch, in every process."""
    compiled: bool = True
    """Measure torch.compile of the dense model too, in every dtype, where there is a compiler."""
    rounds: int = 40
    """Turns of every contender."""
    minutes: float = 5.0
    """Budget; turns that it does not reach are left out, and models that it does not reach are not run."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of timm's model and the engine; bfloat16 is not run where the processor does not multiply it."""
    seed: int = 0
    """Of weights and images."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.minutes <= 0:
            raise UserError(f"batches and minutes must be positive, got {self.batches} and {self.minutes}")
        if not self.dtypes or set(self.dtypes) - {"float32", "bfloat16"}:
            raise UserError(f"dtypes must be float32 or bfloat16 on a CPU, got {', '.join(self.dtypes) or 'none'}")
        if self.threads < 1 or self.rounds < 3:
            raise UserError(f"threads must be positive and rounds 3 or more, got {self.threads} and {self.rounds}")


def bench_cpu(plan: CpuPlan, show: Callable[[str], None] = print, keep: Callable[[dict], None] = lambda result: None) -> dict:
    """Measure and return a JSON-able dict: conditions and one row a contender and batch. `keep` gets the result so far after every batch."""
    rows: list[dict] = []
    found = conditions("cpu", **asdict(plan)) | {
        "threads": plan.threads, "capability": torch.backends.cpu.get_cpu_capability(), "onednn": str(onednn()), "load_before": os.getloadavg()[0],
    }  # fmt: skip
    result = {"conditions": found, "rows": rows}
    end = time.monotonic() + 60 * plan.minutes
    count = len(plan.models) * len(plan.batches)
    for name in plan.models:
        for batch in plan.batches:
            share = (end - time.monotonic()) / count
            count -= 1
            fresh = [{"model": name, "batch": batch} | row for row in _measure(name, batch, plan, share)]
            rows += fresh
            for row in fresh:
                show(_line(row))
            found["load_after"] = os.getloadavg()[0]
            keep(result)
    return result


@dataclass(frozen=True)
class Contender:
    """One way to compute a model's logits."""

    how: Literal["eager", "memory kept", "compiled", "engine"]
    """timm's model as it is, as it is after `keep_freed_memory`, or compiled; or an engine."""
    recipe: str = "dense"
    """Of an engine."""
    dtype: str = "float32"
    """It computes in."""

    def __str__(self) -> str:
        name = f"engine {self.recipe}" if self.how == "engine" else "timm eager, memory kept" if self.how == "memory kept" else f"timm {self.how}"
        return name if self.dtype == "float32" else f"{name} {self.dtype}"


BASELINE = Contender("eager")


def _contenders(plan: CpuPlan) -> list[Contender]:
    ways = [("eager", "dense"), ("memory kept", "dense"), *([("compiled", "dense")] if plan.compiled else [])]
    ways += [("engine", recipe) for recipe in (*plan.recipes, "dense")]
    made = [Contender(*way, dtype) for dtype in plan.dtypes for way in ways]
    return [BASELINE, *(contender for contender in made if contender != BASELINE)]


def _measure(name: str, batch: int, plan: CpuPlan, seconds: float) -> list[dict]:
    """One row a contender."""
    end = time.monotonic() + seconds
    contenders = _contenders(plan)
    with _workers(name, batch, plan, contenders) as pipes:
        rows = {}
        for contender, pipe in pipes.items():
            # One after the other: they must not disturb each other's first calls, which fix what is correct but also what is cached.
            pipe.send("start")
            rows[contender] = {"contender": str(contender)} | pipe.recv()
        running = [c for c in contenders if rows[c]["status"] == "measured"]
        times: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in running}
        for turn in range(plan.rounds):
            if turn >= 3 and time.monotonic() > end:
                break
            for contender in running:
                pipes[contender].send("time")
                times[contender].append(pipes[contender].recv())
    for contender in running:
        for clock, title in enumerate(("wall", "processor")):
            mine = [turn[clock] for turn in times[contender]]
            rows[contender][title] = _spread(mine)
            if BASELINE in times:
                rows[contender][f"{title}_ratio"] = _spread([theirs[clock] / time for theirs, time in zip(times[BASELINE], mine, strict=True)])
        rows[contender] |= _in_common([wall for wall, _ in times[contender]], batch)
        rows[contender]["turns"] = len(times[contender])
    return [rows[contender] for contender in contenders]


def _spread(values: list[float]) -> dict[str, float]:
    low, *_, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "low": low, "high": high}


def _in_common(milliseconds: list[float], batch: int) -> dict[str, float]:
    """The wall clock in the fields that rows of every benchmark have, which `--against` and reports read."""
    middle, tenths = median(milliseconds), quantiles(milliseconds, n=10, method="inclusive")
    return {"median_us": 1e3 * middle, "low_us": 1e3 * tenths[0], "high_us": 1e3 * tenths[-1], "images_per_s": 1e3 * batch / middle}


@contextmanager
def _workers(name: str, batch: int, plan: CpuPlan, contenders: list[Contender]) -> Iterator[dict]:
    # One server imports everything once; its children start in their own state, before any thread or allocation of torch's.
    context, pipes, processes = multiprocessing.get_context("forkserver"), {}, []
    context.set_forkserver_preload(["shiftaddvit.engine.bench_cpu"])
    try:
        for contender in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, contender, name, batch, plan), daemon=True)
            process.start()
            theirs.close()
            pipes[contender] = ours
            processes.append(process)
        yield pipes
    finally:
        # A closed pipe ends its worker in the ordinary way, so that it gives back what it holds (torch.compile's progress bar has a named
        # semaphore); only one that is still busy, because we were interrupted, is stopped.
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(SECONDS_TO_END)
            process.terminate()
            process.join()


def _serve(pipe, contender: Contender, name: str, batch: int, plan: CpuPlan) -> None:
    """A contender's process: check when told to start, then time one call whenever asked."""
    torch.set_num_threads(plan.threads)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pipe.recv()
        found, call = _build(contender, name, batch, plan)
        pipe.send(found)
        while True:
            pipe.recv()
            call()  # brings weights and code back into the caches that the others have used meanwhile
            start, used = time.perf_counter(), time.process_time()
            call()
            pipe.send((1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - used)))


@torch.inference_mode()
def _build(contender: Contender, name: str, batch: int, plan: CpuPlan) -> tuple[dict, Callable[[], object]]:
    """What is said of a contender before it is timed, and what is timed."""
    torch.manual_seed(plan.seed)
    model, dtype = timm.create_model(name).eval(), getattr(torch, contender.dtype)
    size = getattr(model.patch_embed, "img_size", None) or (224, 224)
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(plan.seed))
    given = images.to(dtype)
    if dtype == torch.bfloat16 and not onednn().bfloat16:
        return {"status": "not run: this processor does not multiply bfloat16"}, lambda: None
    if contender.how == "compiled" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return {"status": "not run: no C++ compiler"}, lambda: None
    start = time.monotonic()
    if contender.how == "engine":
        with torch.inference_mode(False):
            model = model if contender.recipe == "dense" else converted(model, contender.recipe)
            engine = deploy(model, device="cpu", image_size=tuple(size), dtype=dtype)
        call = partial(engine, given)
    else:
        timed = model if dtype == torch.float32 else deepcopy(model).to(dtype)
        if contender.how == "memory kept":
            keep_freed_memory()
        call = partial(_inference, torch.compile(timed, dynamic=False) if contender.how == "compiled" else timed, given)
    y = call()
    seconds = time.monotonic() - start
    exact = model(images)
    for _ in range(2):
        call()
    found = {
        "seconds_to_first_result": seconds, "top1_agreement": float((y.argmax(1) == exact.argmax(1)).float().mean()),
        "dtype": contender.dtype, **_errors(y.float(), exact, partial(model, images), dtype),
    }  # fmt: skip
    return found, call


def _errors(y: Tensor, exact: Tensor, model: Callable[[], Tensor], dtype: torch.dtype) -> dict:
    """How far the logits are from the float32 model's, and whether that is near enough."""
    if dtype == torch.float32:
        errors = (y - exact).abs().amax(1) / exact.abs().max()
        found = {"error": float(errors.median()), "worst_error": float(errors.max())}
        return found | {"status": "measured" if found["error"] <= TOLERANCE and found["worst_error"] <= WORST else "wrong"}
    with torch.autocast("cpu", dtype):
        own = float((model().float() - exact).norm() / exact.norm())
    found = {"error": float((y - exact).norm() / exact.norm()), "error_of_autocast": own}
    return found | {"status": "measured" if found["error"] <= max(LEAST_TOLERANCE, 2 * own) else "wrong"}


@torch.inference_mode()
def _inference(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _line(row: dict) -> str:
    head = f"{row['model']:14s}{row['batch']:4d}  {row['contender']:34s}"
    if row["status"] != "measured":
        return f"{head}{row['status']}" + (f": error {row['error']:.1e}" if "error" in row else "")
    parts = [f"{row[clock]['median']:8.1f} ms [{row[clock]['low']:.1f} … {row[clock]['high']:.1f}]" for clock in ("wall", "processor")]
    if "wall_ratio" in row:
        parts = [f"{part} {row[f'{clock}_ratio']['median']:.2f}×" for part, clock in zip(parts, ("wall", "processor"), strict=True)]
    return f"{head}{parts[0]}, processor time {parts[1]}, {row['turns']} turns, first result after {row['seconds_to_first_result']:.1f} s, error {row['error']:.0e}"
