"""Measure whole models on a GPU (`shiftaddvit bench model`). Correct first, then timed.

A contender is right when its logits are at most twice as far from the float32 model's as those of the same model under torch.autocast
in its dtype; a wrong one has no time. What the budget of minutes does not reach is written down as not run.
"""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles

import timm
import torch
from torch import Tensor, nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1 with timm)
from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.ops.timing import Timing, copies_for, failure_noted, time_call

from .bench_subjects import converted
from .deploy import deploy
from .engine import Engine

LEAST_TOLERANCE = 1e-2
"""Error (2-norm, relative) that any half-precision contender may have."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    models: tuple[str, ...] = ("pvt_v2_b0",)
    """Names in timm's registry."""
    recipes: tuple[str, ...] = ("ours-quant-moe",)
    """Converted forms of each model, besides the dense one."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Batch sizes."""
    dtype: str = "bfloat16"
    """Of the engine."""
    pdl: bool | None = None
    """Overlap kernel launches in the engine; None where the GPU can."""
    compiled: bool = True
    """Measure torch.compile too."""
    steps: bool = True
    """Time every step of the engine."""
    minutes: float = 5.0
    """Budget; what comes after it is not run."""
    seed: int = 0
    """Of weights and images."""

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise UserError(f"dtype must be bfloat16, float16 or float32, got {self.dtype!r}")
        if not self.batches or min(self.batches) < 1 or self.minutes <= 0:
            raise UserError(f"batches and minutes must be positive, got {self.batches} and {self.minutes}")


def bench_models(plan: Plan, show: Callable[[str], None] = print, keep: Callable[[dict], None] = lambda result: None) -> dict:
    """Measure and return a JSON-able dict: conditions and one row a contender, with steps where asked. `keep` gets the result so far
    after every row. UserError without a CUDA device."""
    if not torch.cuda.is_available():
        raise UserError("measuring models needs a CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows: list[dict] = []
    result = {"conditions": conditions("cuda", **asdict(plan)), "rows": rows}
    end = time.monotonic() + 60 * plan.minutes
    for name in plan.models:
        for batch in plan.batches:
            baseline: float | None = None
            for row in _contenders(name, batch, plan):
                if time.monotonic() > end:
                    rows.append({"model": name, "batch": batch, "contender": row.contender, "status": "not run: out of time"})
                else:
                    rows.append({"model": name, "batch": batch, "contender": row.contender})
                    with failure_noted(rows[-1]):
                        rows[-1] |= _measure(row, batch, plan)
                    torch.cuda.empty_cache()
                if row.contender == "timm float16 compiled":
                    baseline = rows[-1].get("median_us")
                show(_line(rows[-1]))
                keep(result)
            _add_ratios(rows, name, batch, baseline, show)
            keep(result)
    return result


@dataclass(frozen=True)
class Contender:
    """One way to compute a model's logits."""

    contender: str
    """Its name in the table."""
    model: nn.Module
    """In float32, on the CPU."""
    dtype: torch.dtype
    """It computes in."""
    build: Callable[[nn.Module, Tensor], tuple[Callable[[], Tensor], Callable[[], object], Engine | None]]
    """From the model and images on the GPU: what gives logits, what is timed, and the engine."""


def _contenders(name: str, batch: int, plan: Plan) -> Iterator[Contender]:
    torch.manual_seed(plan.seed)
    dense = timm.create_model(name).eval()
    engine = partial(_engine, plan=plan, batch=batch)
    dtype = getattr(torch, plan.dtype)
    for recipe in plan.recipes:
        yield Contender(f"engine {recipe} {plan.dtype}", converted(dense, recipe), dtype, engine)
    yield Contender(f"engine dense {plan.dtype}", dense, dtype, engine)
    if plan.compiled:
        yield Contender("timm float16 compiled", dense, torch.float16, _compiled)
    yield Contender("timm float16 graphed", dense, torch.float16, _graphed)
    yield Contender("timm float16 eager", dense, torch.float16, _eager)


@torch.no_grad()
def _measure(contender: Contender, batch: int, plan: Plan) -> dict:
    """Check, then time."""
    model = deepcopy(contender.model).cuda()
    size = getattr(model.patch_embed, "img_size", None) or (224, 224)
    images = torch.randn(batch, 3, *size, device="cuda", generator=torch.Generator("cuda").manual_seed(plan.seed))
    few = images[: min(batch, 32)]
    exact = model(few)
    with torch.autocast("cuda", contender.dtype, enabled=contender.dtype != torch.float32):
        own = _error(model(few), exact)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.monotonic()
    logits, timed, engine = contender.build(model, images.to(contender.dtype))
    y = logits()[: len(few)].float()
    torch.cuda.synchronize()
    found = {
        "contender": contender.contender,
        "seconds_to_build": time.monotonic() - start,
        "error": _error(y, exact),
        "error_of_autocast": own,
        "top1_agreement": float((y.argmax(1) == exact.argmax(1)).float().mean()),
    }
    if not found["error"] <= max(LEAST_TOLERANCE, 2 * own):
        return found | {"status": "wrong"}
    found |= {"status": "measured"} | asdict(time_repeated(timed))
    found["images_per_s"] = batch / found["median_us"] * 1e6
    found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if engine is not None:
        found |= {"pdl": engine.launch.pdl, "replay_us": asdict(time_repeated(engine.replayer(batch)))}
        if plan.steps:
            found["steps"] = step_times(engine, images)
    return found


def _engine(model: nn.Module, images: Tensor, plan: Plan, batch: int):
    engine = deploy(model, batch, getattr(torch, plan.dtype), "cuda", tuple(images.shape[2:]), pdl=plan.pdl, tune_seconds=0)
    # A whole call, with the copies of images and logits, as the compiled model's is; without them `replay_us`.
    call = partial(engine, images)
    return call, call, engine


def _eager(model: nn.Module, images: Tensor):
    call = partial(model.half(), images)
    return call, call, None


def _compiled(model: nn.Module, images: Tensor):
    torch._dynamo.reset()
    call = partial(torch.compile(model.half(), mode="reduce-overhead", dynamic=False), images)
    for _ in range(3):
        call()
    return lambda: call().clone(), call, None


def _graphed(model: nn.Module, images: Tensor):
    model = model.half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(images)

    def logits() -> Tensor:
        graph.replay()
        return y.clone()

    return logits, graph.replay, None


def time_repeated(call: Callable[[], object], seconds: float = 0.7) -> Timing:
    """Time of one call among many in a row, by events on the device; a call slower to launch than to run shows its launch."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.monotonic()
    call()
    torch.cuda.synchronize()
    count = max(20, min(2000, int(seconds / max(time.monotonic() - start, 1e-5))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times = [1e3 * a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    tenths = quantiles(times, n=10)
    return Timing(median(times), tenths[0], tenths[-1], count, 1)


@torch.no_grad()
def step_times(engine: Engine, images: Tensor, seconds: float = 0.05) -> list[dict]:
    """Time of every step alone, by graph replay over rotating inputs: where the time goes."""
    program, launch = engine.program, engine.launch
    x, rows = images.to(engine.dtype), []
    for step in program.steps:
        inputs = [(x,), *((x.clone(),) for _ in range(min(8, copies_for([x])) - 1))]
        timing = time_call(partial(step.run, launch=launch), inputs, seconds, least_calls=8)
        about = step.about()
        rows.append({"step": step.name, "ops": about.ops, "shape": about.shape, "fused": about.fused} | asdict(timing))
        x = step.run(x, launch)
    return rows


def _error(y: Tensor, exact: Tensor) -> float:
    """‖y − exact‖ / ‖exact‖; a large number where y is not finite."""
    error = float((y.float() - exact).norm() / exact.norm())
    return error if error < 1e30 else 1e30


def _add_ratios(rows: list[dict], name: str, batch: int, baseline: float | None, show: Callable[[str], None]) -> None:
    """How many times faster than the compiled dense float16 model each engine is."""
    for row in rows:
        if baseline and row["model"] == name and row["batch"] == batch and row["contender"].startswith("engine") and "median_us" in row:
            row["times_faster_than_compiled"] = baseline / row["median_us"]
            show(f"{name} batch {batch}: {row['contender']} is {row['times_faster_than_compiled']:.2f}× as fast as timm float16 compiled")


def _line(row: dict) -> str:
    head = f"{row['model']:22s}{row['batch']:5d}  {row['contender']:36s}"
    if row["status"] != "measured":
        return f"{head}{row['status']}" + (f": error {row['error']:.1e}, autocast's {row['error_of_autocast']:.1e}" if "error" in row else "")
    line = (
        f"{head}{row['median_us']:10.1f} µs [{row['low_us']:.1f} … {row['high_us']:.1f}]  {row['images_per_s']:9.0f} images/s  "
        f"{row['peak_bytes'] / 1e6:7.0f} MB  error {row['error']:.0e} (autocast {row['error_of_autocast']:.0e})"
    )
    steps = row.get("steps", [])
    slow = [f"    {s['median_us']:9.1f} µs  {s['step']:26s}{s['ops']}" for s in steps]
    total = [f"    {sum(s['median_us'] for s in steps):9.1f} µs  all steps one by one"] if steps else []
    return "\n".join([line, *slow, *total])
