"""`shiftaddvit report`: one page from result files."""

from pathlib import Path
from typing import Annotated

import typer

from shiftaddvit.errors import UserError

from . import options
from .failures import refuse_existing


def report(
    runs: Annotated[list[Path], typer.Argument(help="Result files (.json), or folders of them: a run, the quickstart's folder, results/.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .html file to write. (default: report.html in the first folder, or beside the first file)")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write every chart as .svg and .png and every table as .md, .tex and .csv into this folder.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    overwrite: options.Overwrite = False,
) -> None:  # fmt: skip
    """Show results in one HTML page that works offline: tables, trade-offs, energy, training, and which image regions multiply."""
    from shiftaddvit.report import write_report

    first = runs[0]
    target = output or (first if first.is_dir() else first.parent) / "report.html"
    if target.suffix != ".html":
        raise UserError(f"--output must end in .html, got {str(target)!r}")
    refuse_existing(target, overwrite)
    if figures is not None and figures.is_dir() and any(figures.iterdir()) and not overwrite:
        raise UserError(f"--figures {figures} already holds files: name another folder, or replace them with --overwrite")
    if figures is not None and figures.is_file():
        raise UserError(f"--figures {figures} is a file: name a folder")
    written = write_report(runs, target, title=title, figures=figures)
    for entry in written.skipped:
        typer.echo(f"left out: {entry.path} {entry.reason}", err=True)
    typer.echo(
        f"written: {written.page} ({written.bytes / 1000:,.0f} kB) from {written.files} result file{'s' if written.files != 1 else ''}; "
        "open it in a browser"
    )
    if written.figures:
        typer.echo(f"written: {len(written.figures)} figures and tables in {figures}")
