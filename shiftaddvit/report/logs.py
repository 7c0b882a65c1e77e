"""Training curves from a run's log; a line that a kill cut short is left out and counted."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .results import Curve


def read_curve(path: Path, finished: bool) -> tuple[Curve | None, list[str]]:
    """The curve of a `log.jsonl` (None where it holds none), and what was left out."""
    events, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            event = None
        if isinstance(event, Mapping):
            events.append(event)
        elif line.strip():
            broken += 1
    reasons = [f"{broken} line{'s' if broken > 1 else ''} of the log cut short or damaged, left out"] if broken else []
    if any("train_psnr" in event for event in events):
        curve = _view_synthesis(path, events, finished)
    else:
        curve = _classification(path, events, finished)
    if curve is not None and not finished:
        reasons.append("this run has no result yet: its curve is shown, its accuracy is not")
    return curve, reasons


def _classification(path: Path, events: list[Mapping[str, Any]], finished: bool) -> Curve | None:
    """Epochs run on through the stages: a stage starts where the one before it ended."""
    steps = [event for event in events if event.get("event") == "step" and _numbers(event, "stage", "epoch", "step", "loss")]
    scores = [event for event in events if event.get("event") == "evaluate" and _numbers(event, "stage", "epoch", "top1")]
    if not steps and not scores:
        return None
    last_step = max((event["step"] for event in steps), default=1) or 1
    length: dict[float, float] = {}
    for event in (*steps, *scores):
        done = event["epoch"] + (1 if "step" in event else 0)
        length[event["stage"]] = max(length.get(event["stage"], 0), done)
    starts, total = {}, 0.0
    for stage in sorted(length):
        starts[stage], total = total, total + length[stage]
    # A run that was resumed did some steps twice: the later ones count.
    loss = {starts[event["stage"]] + event["epoch"] + event["step"] / last_step: event["loss"] for event in steps}
    score = {starts[event["stage"]] + event["epoch"]: event["top1"] for event in scores}
    return Curve(path.parent.name, tuple(sorted(loss.items())), tuple(sorted(score.items())), "classification", finished, str(path))


def _view_synthesis(path: Path, events: list[Mapping[str, Any]], finished: bool) -> Curve | None:
    train = {event["step"]: event["train_psnr"] for event in events if _numbers(event, "step", "train_psnr")}
    held_out = {event["step"]: event["held_out_psnr"] for event in events if _numbers(event, "step", "held_out_psnr")}
    return Curve(path.parent.name, tuple(sorted(train.items())), tuple(sorted(held_out.items())), "view synthesis", finished, str(path))


def _numbers(event: Mapping[str, Any], *keys: str) -> bool:
    values = [event.get(key) for key in keys]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values)
