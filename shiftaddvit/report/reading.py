"""From paths to results: find the files, know them, check them, and say what was left out."""

import json
from collections.abc import Iterable, Iterator, Mapping
from os.path import abspath
from pathlib import Path
from typing import Any

from shiftaddvit.errors import UserError
from shiftaddvit.schema import ANNOTATIONS, STAMP, VERSIONS, digest

from .fields import Fields, Unusable
from .kinds import READERS
from .logs import read_curve
from .read_experts import is_old_profile
from .results import Results, Skipped
from .sources import Source

LARGEST = 256 * 2**20
"""A larger file is no result of ours."""
RUN, LOG, RESULT = "run.json", "log.jsonl", "result.json"
"""Files of a run's folder."""
FORMS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (kind, frozenset(names.split()))
    for kind, names in (
        ("finetune", "evaluation history stages config conditions"),
        ("quickstart", "rows seconds budget finetune seed"),
        ("evaluate", "file split precision top1 correct"),
        ("sensitivity", "dense rows skipped"),
        ("energy", "total_mj per_layer settings"),
        ("energy-compare", "baseline recipes"),
        ("energy-sweep", "over values total_mj"),
        ("ops-bench", "ceilings rows conditions"),
        ("train-bench", "kind conditions rows"),
        ("nvs-evaluate", "scene psnr ssim views"),
        ("nvs-bench", "scene width height rows"),
        ("nvs-train", "steps train_psnr held_out_psnr"),
        ("search", "identity budgets met minimised damage cost units found front rows recipe tables"),
        ("search-latency", "quantity unit identity settings conditions rest costs"),
    )
)
"""How files from before there were stamps are known: fields that they all have."""


def read_results(paths: Iterable[str | Path]) -> Results:
    """Everything that the files and folders hold. UserError for a path that does not exist or holds no result at all."""
    found = Results()
    seen: set[str] = set()
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given} does not exist; give result files or folders that hold some")
        for path in _files(given):
            _read(path, _shown(given, path), given.is_file(), found, seen)
    if not (found.sources or found.curves):
        why = "".join(f"; {entry.path}: {entry.reason}" for entry in found.skipped[:5])
        raise UserError(f"no results in {', '.join(map(str, paths))}{why}")
    return found


def _files(given: Path) -> Iterator[Path]:
    """Candidates, in the order of their names; nothing hidden."""
    if given.is_file():
        yield given
        return
    for path in sorted([*given.rglob("*.json"), *given.rglob(LOG)]):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(given).parts):
            yield path


def _shown(given: Path, path: Path) -> str:
    """From the named folder on: a page that is passed on says nothing of the folders above."""
    whole, named = Path(abspath(path)), Path(abspath(given))  # links are not followed: they may lead elsewhere
    return str(whole.relative_to(named.parent if given.is_dir() else whole.parent.parent))


def _read(path: Path, shown: str, named: bool, found: Results, seen: set[str]) -> None:
    if path.name == LOG:
        curve, reasons = read_curve(path, (path.parent / RESULT).exists())
        found.skipped += [Skipped(shown, reason) for reason in reasons]
        found.curves += [curve] if curve is not None else []
        return
    if path.name == RUN:
        return
    try:
        values = _values(path)
        known = _kind(values, named)
        if known is None:
            return
        source = _source(shown, known, values)
        if source.digest in seen:
            return
        READERS[known](Fields(values), source, found)
        seen.add(source.digest)
        found.sources.append(source)
    except Unusable as reason:
        found.skipped.append(Skipped(shown, str(reason)))


def _values(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > LARGEST:
        raise Unusable(f"is larger than {LARGEST >> 20} MiB")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"is not whole JSON ({error})") from None
    return values if isinstance(values, Mapping) else {}


def _refuse_constant(name: str) -> None:
    raise Unusable(f"holds {name}, which is no number")


def _kind(values: Mapping[str, Any], named: bool) -> str | None:
    """The kind of a file that may be used; None for a file that is nobody's result."""
    stamp = values.get(STAMP)
    if isinstance(stamp, Mapping):
        kind, version = stamp.get("kind"), stamp.get("version")
        if not isinstance(kind, str) or kind not in VERSIONS:
            raise Unusable(f"is of kind {str(kind)[:40]!r}, which this version does not know")
        if version != VERSIONS[kind] or isinstance(version, bool):
            raise Unusable(f"is version {str(version)[:20]} of {kind!r}; this version reads {VERSIONS[kind]}")
        if stamp.get("digest") != digest(values):
            raise Unusable("was changed after it was written: its digest no longer fits")
        return kind
    kind = next((kind for kind, names in FORMS if names <= values.keys()), None) or _form_of_keys(values)
    if kind is None and named:
        raise Unusable("is no result file of shiftaddvit")
    return kind


def _form_of_keys(values: Mapping[str, Any]) -> str | None:
    """What is known by the form of its rows or keys."""
    if is_old_profile(values):
        return "expert-latency"
    rows = values.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(row, Mapping) and {"model", "batch", "contender", "status"} <= row.keys() for row in rows):
        return "engine-bench"
    return None


def _source(path: str, kind: str, values: Mapping[str, Any]) -> Source:
    conditions = values.get("conditions")
    if not isinstance(conditions, Mapping) and isinstance(values.get("evaluation"), Mapping):
        conditions = values["evaluation"].get("conditions")
    conditions = (
        {str(key): value for key, value in conditions.items() if isinstance(value, (str, int, float, bool))}
        if isinstance(conditions, Mapping)
        else {}
    )
    texts = tuple((key, values[key]) for key in ANNOTATIONS if isinstance(values.get(key), str))
    stamp = values.get(STAMP)
    mine = stamp["digest"] if isinstance(stamp, Mapping) else digest(values)  # `_kind` has checked a stamp's
    return Source(path, kind, mine, str(conditions.get("time", "")), conditions, STAMP in values, texts)
