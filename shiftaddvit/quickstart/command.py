"""`shiftaddvit quickstart`: the whole job on embedded images, offline, in about two minutes."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shiftaddvit.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .rows import Budget, RowResult

RESULT = "quickstart.json"


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the converted models and the numbers; nothing is written elsewhere.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda to use a GPU.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
    as_json: Annotated[str | None, typer.Option("--json", help="Also write the numbers as JSON to this file, or to the output for '-'.")] = None,
) -> None:  # fmt: skip
    """Convert, fine-tune, evaluate and save the main rows on embedded images: no download, no GPU, about two minutes on two cores."""
    from rich.console import Console

    from .rows import Budget

    # Tables make way for JSON on the output; piped output gets room for whole lines.
    console = Console(stderr=as_json == "-", width=None if sys.stdout.isatty() else 120, highlight=False)
    run(output, Budget(), console, seed=seed, device=device, overwrite=overwrite, as_json=as_json)


def run(output: Path, budget: "Budget", console: "Console", *, seed: int = 0, device: str = "cpu", overwrite: bool = False,
        as_json: str | None = None, show: bool = True) -> "list[RowResult]":  # fmt: skip
    """Do all rows, print the table and what to do next, and write it to `output`.

    Raises:
        UserError: a folder that already holds something (unless `overwrite`), or a device that is not there.
    """
    from shiftaddvit.conditions import conditions
    from shiftaddvit.files import write_json
    from shiftaddvit.schema import stamped

    from .assets import load_images
    from .rows import ROWS, Setting, claim_device, converted_row, dense_row
    from .table import PLAIN_WORDS, next_steps, reading, results_table, saved, see

    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} already holds files: replace its run (--overwrite) or choose another folder (--output)")
    if as_json not in (None, "-") and Path(as_json).exists() and not overwrite:
        raise UserError(f"--json {as_json} exists already: name another file, or replace it with --overwrite")
    started = time.monotonic()
    setting = Setting(load_images(), budget, output, claim_device(device), seed, show)
    console.print(
        f"Fashion-MNIST, {budget.train_images:,} training and {budget.test_images:,} test images; a small PVTv2 pre-trained on its whole "
        f"training set; {len(ROWS)} rows, each converted, fine-tuned in two stages, evaluated and saved."
    )
    rows = [dense_row(setting)]
    console.print(f"dense: top-1 {rows[0].evaluation.top1:.1f} %")
    for number, name in enumerate(ROWS, start=1):
        console.print(f"[bold]row {number} of {len(ROWS)}: {name}[/bold] (recipe {ROWS[name]})")
        rows.append(converted_row(name, rows[0], setting))
        console.print(f"  top-1 {rows[-1].evaluation.top1:.1f} % after {rows[-1].seconds:.0f} s")
    seconds = time.monotonic() - started
    console.print()
    console.print(results_table(rows))
    console.print(reading())
    console.print()
    console.print(saved(rows[-1]), soft_wrap=True)
    console.print(f"All models and {RESULT}, the numbers with their conditions, are in {output}/; {seconds:.0f} s in all.", soft_wrap=True, markup=False)
    console.print(see(shlex.quote(str(output))), soft_wrap=True)
    console.print()
    console.print(PLAIN_WORDS, style="bold")
    console.print()
    console.print(next_steps(), soft_wrap=True)
    values = {"rows": [row.to_json() for row in rows], "seconds": seconds, **setting.to_json(), "conditions": conditions(setting.device, seed=seed)}
    result = stamped("quickstart", values)
    write_json(output / RESULT, result)
    if as_json == "-":
        json.dump(result, sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    elif as_json is not None:
        write_json(as_json, result)
    return rows
