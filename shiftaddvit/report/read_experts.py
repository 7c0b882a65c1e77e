"""Reader of the measured times of experts, which the balance loss weighs them by."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .fields import Fields
from .results import ExpertTimes, Results
from .sources import Source

_OLD = re.compile(
    r"(?P<device>[^|]+) \| (?P<layer>linear|mlp) (?P<shape>\d+(?:->\d+)+) (?P<experts>(?:mult|shift)(?:/(?:mult|shift))+) "
    r"\| tokens (?P<tokens>\d+) \| torch\.(?P<dtype>\w+)\Z"
)
"""What identified a row before there were stamps."""
SIDES = {"linear": 2, "mlp": 3}
"""Numbers of a layer's shape: features in, (hidden,) out."""


def is_old_profile(values: Mapping[str, Any]) -> bool:
    """Whether unstamped values are such a file: nothing else has keys of this form."""
    return any(_OLD.match(key) for key in values)


def read_expert_times(values: Fields, source: Source, found: Results) -> None:
    """Every row; two rows that are of the same layer on the same device contradict one another."""
    rows = _old_rows(values) if "rows" not in values else values.each("rows")
    times = [_times(row, source) for row in rows]
    if not times:
        values.fail("has no rows")
    if len({one.same for one in times}) != len(times):
        values.fail("has two rows of the same layer, tokens, type and device")
    found.expert_times += times


def _times(row: Fields, source: Source) -> ExpertTimes:
    layer, shape, experts = row.text("layer"), row.list("shape"), row.list("experts")
    if layer not in SIDES:
        row.fail(f"'layer' must be linear or mlp, is {layer[:40]!r}")
    if len(shape) != SIDES[layer] or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape):
        row.fail(f"'shape' of a {layer} must be {SIDES[layer]} whole numbers above 0")
    if len(experts) < 2 or not all(kind in ("mult", "shift") for kind in experts):
        row.fail("'experts' must be two or more of 'mult' and 'shift'")
    seconds = row.numbers("seconds", 0, 3600)
    if len(seconds) != len(experts) or 0.0 in seconds:
        row.fail(f"'seconds' must be {len(experts)} numbers above 0, one for each expert")
    conditions = row.fields("conditions").values if "conditions" in row else {}
    mixtures = row.list("mixtures") if "mixtures" in row else []
    if not all(isinstance(name, str) for name in mixtures):
        row.fail("'mixtures' must be names of modules")
    device, dtype = row.text("device"), row.text("dtype")
    if not device.strip() or not dtype.isidentifier():
        row.fail("'device' or 'dtype' does not say what it is")
    return ExpertTimes(
        layer, tuple(shape), tuple(experts), row.count("tokens", 1), dtype, seconds, device, tuple(mixtures), str(conditions.get("time", "")),
        str(conditions.get("timed", "")), source,
    )  # fmt: skip


def _old_rows(values: Fields) -> Iterable[Fields]:
    for key in values.values:
        match = _OLD.match(key)
        if match is None:
            values.fail(f"{key[:60]!r} names no layer, tokens and device")
        row = match.groupdict() | {"seconds": values.list(key), "tokens": int(match["tokens"]), "experts": match["experts"].split("/")}
        yield Fields(row | {"shape": [int(side) for side in match["shape"].split("->")]}, repr(key))
