"""What the command line does when something goes wrong: one line and an exit code; a bug keeps its traceback."""

import errno
import os
import shlex
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from typer.core import TyperGroup

from shiftaddvit.errors import UserError

USER, INTERRUPTED = 2, 130
"""Exit codes: the user's mistake, and Ctrl-C."""

RESUMABLE = (["finetune"], ["pretrain"], ["nvs", "train"])
"""Commands that go on with `--resume`."""

PAIRS = {"--epochs": "1 1", "--lr": "0.001 0.001"}
"""Options of finetune, one number a stage, and how they are given."""

_USAGE = typer.BadParameter.__base__  # typer brings its own click and exports this one by its subclass only
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ARGUMENTS = "shiftaddvit.arguments"


class Commands(TyperGroup):
    """The commands, with errors that a user can act on as one line each."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:
        try:
            with one_line_warnings():
                return super().invoke(ctx)
        except UserError as error:
            raise _told(str(error)) from error
        except _USAGE as error:
            if not error.format_message() or ctx.invoked_subcommand is None:
                raise
            wanted = _wanted(error, ctx.meta[_ARGUMENTS])
            raise _told(f"{wanted or error.format_message().replace('Value error, ', '').rstrip('.')} (see --help)") from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            arguments = ctx.meta[_ARGUMENTS]
            if any(arguments[: len(command)] == command for command in RESUMABLE) and holds_run(arguments):
                typer.echo(f"to resume: {resume_command(arguments)}", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except OSError as error:
            if error.errno in _FULL:
                raise _told(f"out of disk{_at(error)}: nothing was replaced; free space and run the command again") from error
            # An error without a file is not about something the user named.
            if error.filename is None or isinstance(error, (ConnectionError, ChildProcessError)):
                raise
            raise _told(f"{error.filename}: {(error.strerror or type(error).__name__).lower()}") from error


def holds_run(arguments: list[str]) -> bool:
    """Whether the folder that `--output` names holds a run by now, which `--resume` asks for."""
    for number, argument in enumerate(arguments):
        if argument in ("-o", "--output"):
            return any((Path(value) / "run.json").exists() for value in arguments[number + 1 : number + 2])
        if argument.startswith(("-o", "--output=")):
            return (Path(argument.removeprefix("--output=").removeprefix("-o")) / "run.json").exists()
    return False


def resume_command(arguments: list[str]) -> str:
    """The command that goes on with a run that was started with these arguments."""
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    program = ["shiftaddvit"] if processes == 1 else ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "shiftaddvit"]
    return shlex.join([*program, *kept, "--resume"])


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Raise UserError before any work is done if the file to write is there already, or cannot be one."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: name another file, or replace it with --overwrite")
    refuse_unwritable(path)


def refuse_unwritable(path: Path) -> None:
    """Raise UserError if no file can be made where `path` is to be; nothing is left behind."""
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise UserError(f"{path} cannot be written: {folder}: {(error.strerror or type(error).__name__).lower()}") from None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Inside, warnings are one line each, without the source that gave them."""

    def show(message: Warning | str, *_: object) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def told_when_memory_ends(batch_size: int) -> Iterator[None]:
    """Turn a device's out-of-memory error into the batch size to try."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = f"try --batch-size {max(1, batch_size // 4 * 2)}" if batch_size > 1 else "try a smaller --image-size"
        raise UserError(f"out of GPU memory with --batch-size {batch_size}: {hint}") from error


@contextmanager
def told_when_disk_is_full(path: Path) -> Iterator[None]:
    """Turn what safetensors and torch raise on a full disk, which is no OSError, into a message."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        text = str(error)
        # torch's zip writer cannot say why a write failed; a file system that has room left writes what it is given.
        if "No space left" not in text and "inline_container.cc" not in text:
            raise
        raise UserError(f"out of disk at {path}: nothing was replaced; free space and run the command again") from error


@contextmanager
def interrupt_only_here() -> Iterator[None]:
    """Inside, Ctrl-C means something to this process only: worker processes, which the terminal tells too, go on until they are
    stopped, so that the step under way can be finished."""
    mine, before = os.getpid(), signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: object) -> None:
        if os.getpid() == mine:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _wanted(error: Exception, arguments: list[str]) -> str | None:
    """What an option of `PAIRS`, or `--image-size`, takes, if the error is about one: the parser's own words name no example."""
    names = [getattr(error, "option_name", None), *getattr(getattr(error, "param", None), "opts", ())]
    for name in names:
        if name in PAIRS and arguments[:1] == ["finetune"]:
            return f"{name} wants two numbers with a space between, as in {name} {PAIRS[name]}"
    for number, argument in enumerate(arguments):
        if argument == "--image-size" and len(arguments) > number + 2 and all(text.isdigit() for text in arguments[number + 1 : number + 3]):
            return f"--image-size wants one value, as in --image-size {arguments[number + 1]}x{arguments[number + 2]}"
    return None


def _told(message: str) -> typer.Exit:
    rank = os.environ.get("RANK", "0")
    where = f" (process {rank})" if rank != "0" else ""
    typer.echo(f"error{where}: {' '.join(message.split())}", err=True)
    return typer.Exit(USER)


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""
