"""Where a run goes on, and whether it had ended already."""

import json
from collections.abc import Sequence
from pathlib import Path

from shiftaddvit.evaluation import Evaluation

from .config import StageConfig
from .position import Position
from .run_folder import MODEL, RESULT


def place(position: Position, stages: Sequence[StageConfig], steps: int) -> str:
    """Where a run goes on, for people."""
    stage = stages[position.stage]
    done = f"{position.epoch} of {stage.epochs} epochs" + (f" and {position.step} of {steps} steps" if position.step else "")
    return f"stage {position.stage + 1} of {len(stages)} ({stage.label}), after {done}"


def reached(folder: Path, position: Position, stages: Sequence[StageConfig], evaluated: bool) -> tuple[bool, Evaluation | None]:
    """Whether the run in `folder` ended and left its model and result, and the evaluation in that result; `evaluated` says whether there
    must be one."""
    if position.stage != len(stages) - 1 or position.epoch < stages[-1].epochs or not (folder / MODEL).exists():
        return False, None
    try:
        values = json.loads((folder / RESULT).read_text())["evaluation"]
        found = None if values is None else Evaluation.from_json(values)
    except (OSError, ValueError, KeyError, TypeError):
        return False, None
    return found is not None or not evaluated, found
