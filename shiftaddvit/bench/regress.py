"""Is a result wrong, and is it slower than a stored one? Both must come from the same kind of device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shiftaddvit.errors import UserError

IDENTITY = ("op", "model", "recipe", "mode", "batch", "shape", "contender", "dtype")
"""Fields that say what a row measured."""
TIME = "median_us"
"""The field compared."""


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether this row of a benchmark's result was found wrong or failed. Every row of every benchmark has a `status`: `measured`,
    `wrong`, `wrong: why`, `failed: why` or `not run: why`."""
    return row["status"].startswith(("wrong", "failed"))


@dataclass(frozen=True)
class Regression:
    """One row that got worse."""

    row: str
    """What was measured."""
    before_us: float
    """Stored median, µs."""
    now_us: float | None
    """New median, µs; None where the row is wrong or missing now."""

    def __str__(self) -> str:
        if self.now_us is None:
            return f"{self.row}: took {self.before_us:.1f} µs, now no right result"
        return f"{self.row}: {self.before_us:.1f} → {self.now_us:.1f} µs ({self.now_us / self.before_us - 1:+.0%})"


def regressions(result: Mapping[str, Any], stored: Mapping[str, Any], tolerance: float = 0.05) -> list[Regression]:
    """Rows of `stored` that are slower in `result` by more than `tolerance` and by more than both spreads allow, or lost their time.

    A row is slower when its median rose by more than the tolerance and even its tenth percentile lies above the stored ninetieth.
    Rows that the new result did not set out to measure are left alone: only models, ops and recipes that it names count.

    Raises:
        UserError: results of different devices, or something that is no benchmark result.
    """
    if tolerance < 0:
        raise UserError(f"tolerance must not be negative, got {tolerance}")
    here, there = (_device(r, name) for r, name in ((result, "the new result"), (stored, "the stored result")))
    if here != there:
        raise UserError(f"the stored result is of {there!r}, this one of {here!r}: times of different devices are not compared")
    now = {_name(row): row for row in result["rows"]}
    subjects = {_subject(row) for row in result["rows"]}
    found = []
    for row in stored["rows"]:
        if TIME not in row or _subject(row) not in subjects:
            continue
        name, before = _name(row), float(row[TIME])
        new = now.get(name)
        if new is None or str(new.get("status", "measured")).startswith("not run"):
            continue
        if TIME not in new:
            found.append(Regression(name, before, None))
        elif new[TIME] > before * (1 + tolerance) and new.get("low_us", new[TIME]) > row.get("high_us", before):
            found.append(Regression(name, before, float(new[TIME])))
    return found


def _device(result: Mapping[str, Any], name: str) -> str:
    rows, conditions = result.get("rows"), result.get("conditions")
    if not isinstance(rows, list) or not isinstance(conditions, Mapping) or "device" not in conditions:
        raise UserError(f"{name} is no benchmark result: it needs the fields 'rows' and 'conditions'")
    return str(conditions["device"])


def _subject(row: Mapping[str, Any]) -> tuple:
    return row.get("op"), row.get("model")


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(f"{field} {row[field]}" if field == "batch" else str(row[field]) for field in IDENTITY if row.get(field) is not None)
