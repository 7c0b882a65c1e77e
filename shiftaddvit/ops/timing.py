"""Timing calls on a GPU: CUDA-graph replays over rotating inputs, medians with their spread, and the device's two ceilings."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median, quantiles

import torch
from torch import Tensor

from shiftaddvit.errors import UserError


@dataclass(frozen=True)
class Timing:
    """Time of one call, over many replays."""

    median_us: float
    """Median, microseconds."""
    low_us: float
    """Tenth percentile."""
    high_us: float
    """Ninetieth percentile."""
    replays: int
    """How many replays were timed."""
    calls: int
    """Calls in one replay."""


def time_call(call: Callable[..., object], inputs: Sequence[tuple], seconds: float = 0.15, least_calls: int = 20) -> Timing:
    """Time `call(*inputs[i])`, i rotating, inside one CUDA graph, so that launch gaps of Python are not in the number.

    Give enough input sets that together they exceed the second-level cache; otherwise the cache is what is measured.
    """
    rounds = math.ceil(least_calls / len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for arguments in inputs:
                call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for arguments in inputs:
                call(*arguments)
    calls = rounds * len(inputs)
    graph.replay()
    one = _replay(graph, 3)[-1]
    replays = max(15, min(400, math.ceil(seconds * 1e3 / max(one, 1e-3))))
    times = [elapsed * 1e3 / calls for elapsed in _replay(graph, replays)]
    tenths = quantiles(times, n=10)
    return Timing(median(times), tenths[0], tenths[-1], replays, calls)


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Milliseconds of each replay."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]


@contextmanager
def failure_noted(row: dict[str, object]) -> Iterator[None]:
    """A contender that cannot be built, launched or held in memory gets the status `failed: …` in its row, so that the others are still
    measured where time on the device is short."""
    kinds: tuple[type[Exception], ...] = (RuntimeError, UserError)
    if find_spec("triton") is not None:
        from triton.errors import TritonError

        kinds += (TritonError,)
    try:
        yield
    except torch.OutOfMemoryError:
        row["status"] = "failed: out of memory, try a smaller batch"
    except kinds as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row["status"] = f"failed: {type(error).__name__}{': ' if lines else ''}{lines[0][:200] if lines else ''}"


def copies_for(tensors: Sequence[Tensor | None], most: int = 48) -> int:
    """How many input sets together hold twice a 64 MB cache."""
    size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return max(2, min(most, math.ceil(128e6 / max(size, 1))))


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written, per second) and bfloat16 matrix rate (operations per second), measured now."""
    source = torch.randn(256 * 2**20, device=device)
    target = torch.empty_like(source)
    copy = time_call(target.copy_, [(source,)], least_calls=4)
    del source, target
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_call(torch.mm, [(left, right)], least_calls=4)
    return {"bytes_per_s": 2 * 2**30 / (copy.median_us * 1e-6), "bf16_flop_per_s": 2 * 8192**3 / (product.median_us * 1e-6)}
