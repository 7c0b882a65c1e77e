"""The command line: every verb of the library under one name. Heavy modules are imported by the command that needs them."""

from typing import Annotated

import typer

from shiftaddvit import __version__
from shiftaddvit.quickstart.command import quickstart

from . import bench, nvs
from .convert import convert
from .dispatch import dispatch
from .energy import energy
from .evaluate import evaluate
from .export import export
from .failures import Commands
from .finetune import finetune, pretrain
from .listing import models, recipes
from .report import report
from .search import search
from .sensitivity import sensitivity

app = typer.Typer(
    cls=Commands,
    help="Give it a pre-trained vision transformer; get back one that shifts and adds, and know its accuracy, latency and energy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point. Exit codes: 0; 2 for a mistake in what was given; 3 from `bench` (wrong or slower) and `search` (budget not met); 130 for
    Ctrl-C, or SIGTERM while training; a bug ends with its traceback and 1."""
    app(prog_name="shiftaddvit")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"shiftaddvit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options before any command."""


for command in (quickstart, convert, finetune, pretrain, evaluate, sensitivity, search, energy, dispatch, export, report, recipes, models):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(nvs.app, name="nvs")
