"""A run's folder: what it is, its log, its last complete checkpoint, its result."""

import errno
import json
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write, write_json

RUN, LOG, CHECKPOINT, RESULT, MODEL = "run.json", "log.jsonl", "checkpoint.pt", "result.json", "model.safetensors"
LATENCY = "latency.json"
IMAGES = "set of images"
"""The entry of a description that is compared only where both runs have one."""


@dataclass(frozen=True)
class RunFolder:
    """Where one run writes. With several processes only the main one writes."""

    path: Path
    """The folder."""
    writes: bool = True
    """Whether this process writes."""

    def open(self, description: dict[str, Any], resume: bool, overwrite: bool) -> bool:
        """Start or resume; returns whether there is a checkpoint to go on from. UserError where another run lies and neither was
        asked for, or where the run to resume was described differently."""
        known = self.path / RUN
        if known.exists() and not (resume or overwrite):
            raise UserError(f"{self.path} already holds a run: resume it (--resume), replace it (--overwrite) or choose another folder")
        if self.writes:
            self._tidy()
        if resume and known.exists():
            before = _described(known)
            changed = [text for key in sorted(before.keys() | description.keys()) if (text := _changed(key, before, _plain(description)))]
            if changed:
                raise UserError(f"{self.path} was started with another {', '.join(changed)}: resume with the same, or use --overwrite")
            return (self.path / CHECKPOINT).exists()
        if self.writes:
            for name in (LOG, CHECKPOINT, RESULT, LATENCY, MODEL):
                (self.path / name).unlink(missing_ok=True)
            with told_when_full(self.path):
                write_json(known, {"description": _plain(description)})
        return False

    def _tidy(self) -> None:
        """Remove what a kill in the middle of writing left: temporary files, and half a line of the log."""
        for name in (RUN, CHECKPOINT, RESULT, LATENCY, MODEL):
            for litter in self.path.glob(f".{name}.*.tmp"):
                litter.unlink(missing_ok=True)
        log = self.path / LOG
        if log.exists() and not log.read_bytes().endswith(b"\n"):
            with told_when_full(self.path), open(log, "a") as file:
                file.write("\n")

    def log(self, event: dict[str, Any]) -> None:
        """Append one line; a line that a kill cut short is skipped by readers."""
        if self.writes:
            with told_when_full(self.path), open(self.path / LOG, "a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        if self.writes:
            with told_when_full(self.path), atomic_write(self.path / CHECKPOINT) as temporary:
                torch.save(state, temporary)

    def load_checkpoint(self) -> dict[str, Any]:
        """The last complete one. UserError where the file was damaged since."""
        path = self.path / CHECKPOINT
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise UserError(f"{path} is damaged: put back a whole copy, or start again with --overwrite") from None

    def write_latency(self, profiles: dict[str, Any]) -> None:
        """The measured times that this run's balance loss weighs experts by."""
        self._write(LATENCY, profiles)

    def write_result(self, result: dict[str, Any]) -> None:
        self._write(RESULT, result)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.writes:
            with told_when_full(self.path):
                write_json(self.path / name, values)


def annotate_result(folder: str | os.PathLike, **texts: str) -> None:
    """Add what only the caller knows, such as `data`, to a run's result: the annotations of `schema.ANNOTATIONS`, which its digest leaves out."""
    path = Path(folder) / RESULT
    write_json(path, json.loads(path.read_text()) | texts)


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The events of a run's log, less a line that is not whole."""
    events = []
    for line in Path(path).read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


@contextmanager
def told_when_full(path: Path):
    """Turn 'no space left' into a message that says what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"out of disk at {path}: the last complete checkpoint is kept; free space and resume") from error


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())["description"]
        return dict(found)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, so it is unknown what run this is: start again with --overwrite") from None


def _changed(key: str, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """An entry of the description that is another now, and the first thing in which it is; None where it is the same."""
    if key == IMAGES and None in (before.get(key), now.get(key)):
        return None  # not known of runs that were started otherwise or by an older version
    found = list(_differences((), before.get(key), now.get(key)))
    if not found:
        return None
    path, *values = found[0]
    first, second = (text if len(text) <= 60 else "another" for text in map(repr, values))
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{key} ({' › '.join((*path, ''))[:-2]}was {first}, is {second}{more})"


def _differences(path: tuple[str, ...], before: Any, now: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(where, what was there, what is there now) of everything that differs."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences((*path, str(key)), before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def loading(loader: Any, processes: int) -> dict[str, Any]:
    """What makes runs on the same images different: the images a step, and how they are changed."""
    augment = getattr(loader, "config", None)
    return {
        "batches": len(loader), "batch_size": getattr(loader, "batch_size", None), "processes": processes,
        "augment": asdict(augment) if is_dataclass(augment) else None,
    }  # fmt: skip
