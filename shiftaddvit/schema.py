"""The kinds of result files and their versions: every writer stamps what it writes, so that a reader knows what it has before it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

STAMP = "shiftaddvit"
"""The key of the stamp in a result file."""
VERSIONS: Mapping[str, int] = {
    "dispatch": 1,
    "energy": 1,
    "energy-compare": 1,
    "energy-sweep": 1,
    "engine-bench": 1,
    "evaluate": 1,
    "expert-latency": 1,
    "finetune": 1,
    "nvs-bench": 1,
    "nvs-evaluate": 1,
    "nvs-train": 1,
    "ops-bench": 1,
    "quickstart": 1,
    "search": 1,
    "search-latency": 1,
    "sensitivity": 1,
    "train-bench": 1,
}
"""The version that this package writes and reads; it goes up when a field changes its meaning or goes away."""
ANNOTATIONS = ("command", "data", "name", "note")
"""Fields that a person may add or change afterwards; readers show them as text."""


def stamped(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` (plain JSON values) with a stamp in front, in place of any they had: what kind of result, which version, and a digest."""
    stamp = {"kind": kind, "version": VERSIONS[kind], "digest": digest(values)}
    return {STAMP: stamp} | {key: value for key, value in values.items() if key != STAMP}


def was_changed(values: Mapping[str, Any]) -> bool:
    """Whether values that carry a stamp no longer fit it; values without one cannot tell."""
    stamp = values.get(STAMP)
    return isinstance(stamp, Mapping) and stamp.get("digest") != digest(values)


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the values as canonical JSON, less stamp and annotations, which may change."""
    kept = {key: value for key, value in values.items() if key not in (STAMP, *ANNOTATIONS)}
    plain = json.loads(json.dumps(kept, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
