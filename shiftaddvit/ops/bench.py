"""Measure the ops on a GPU (`shiftaddvit bench ops`). Correct first, then timed; a wrong result has no time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError, unknown

from .bench_blocks import attention_cases, mlp_cases, patch_cases
from .bench_cases import Case, adder_cases, matadd_cases, matshift_cases, moe_cases
from .timing import ceilings, copies_for, failure_noted, time_call

CASES: dict[str, Callable[[tuple[int, ...]], Iterator[Case]]] = {
    "matshift": matshift_cases,
    "mlp": mlp_cases,
    "linear_attention": attention_cases,
    "moe_linear": moe_cases,
    "matadd": matadd_cases,
    "patch_embed": patch_cases,
    "adder": adder_cases,
}


def bench_ops(
    ops: tuple[str, ...] = (),
    batches: tuple[int, ...] = (1, 32, 256),
    compiled: bool = True,
    seed: int = 0,
    show: Callable[[str], None] = print,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure the named ops (all when empty) and return a JSON-able dict: conditions, ceilings and one row a contender. `keep` gets the
    result so far after every case.

    A row has a status (`measured` or `wrong`), the time's median and tenth and ninetieth percentiles in µs, the error against the exact
    result, achieved bytes/s, the floor (the larger of bytes over copy bandwidth and operations over matrix rate) and the share of it that
    was reached.
    """
    if not torch.cuda.is_available():
        raise UserError("measuring ops needs a CUDA device")
    for op in ops:
        if op not in CASES:
            raise unknown("op", op, CASES)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    limits = ceilings(torch.device("cuda"))
    show(f"copy {limits['bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {limits['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s")
    rows: list[dict] = []
    result = {"conditions": conditions("cuda", seed=seed, batches=list(batches)), "ceilings": limits, "rows": rows}
    for op in ops or CASES:
        for case in CASES[op](batches):
            rows += measure(case, limits, compiled, show)
            keep(result)
    return result


@torch.no_grad()
def measure(case: Case, limits: dict[str, float], compiled: bool, show: Callable[[str], None]) -> list[dict]:
    """Check and time every contender of one case."""
    first = case.inputs()
    inputs = [first, *(case.inputs() for _ in range(copies_for(first) - 1))]
    expected = case.exact(*first)
    floor = max(case.bytes / limits["bytes_per_s"], case.flop / limits["bf16_flop_per_s"]) * 1e6
    rows = []
    for name, call in case.contenders.items():
        if not compiled and "compile" in name:
            continue
        row = {"op": case.op, "shape": case.shape, "contender": name, "bytes": case.bytes, "flop": case.flop, "floor_us": floor}
        with failure_noted(row):
            if name not in case.unchecked:
                row["error"] = relative_error(call(*first), expected, case.units.get(name, 1.0))
            row["status"] = "measured" if row.get("error", 0.0) <= case.tolerance else "wrong"
            if row["status"] == "measured":
                timing = time_call(call, inputs)
                row |= asdict(timing) | {
                    "bytes_per_s": case.bytes / (timing.median_us * 1e-6),
                    "share_of_floor": floor / timing.median_us,
                }
        rows.append({key: value for key, value in row.items() if value == value})
        show(_line(row))
    return rows


def relative_error(y: Tensor, expected: Tensor, unit: float = 1.0) -> float:
    """‖y·unit − expected‖ / ‖expected‖; infinity where only one of them is finite."""
    y = y.to(expected.dtype) * unit
    if y.shape != expected.shape or not torch.equal(y.isfinite(), expected.isfinite()):
        return 1e30
    return float((y - expected).norm() / expected.norm())


def _line(row: dict) -> str:
    name = f"{row['op']:17s}{row['shape']:46s}{row['contender']:26s}"
    if row["status"] != "measured":
        return name + (f"WRONG: error {row.get('error', math.nan):.1e}" if row["status"] == "wrong" else row["status"])
    error = f"{row['error']:.0e}" if "error" in row else "-"
    return (
        f"{name}{row['median_us']:9.2f} µs [{row['low_us']:.2f} … {row['high_us']:.2f}]  {row['bytes_per_s'] / 1e12:5.2f} TB/s  "
        f"{row['share_of_floor']:4.0%} of the floor  error {error}"
    )
