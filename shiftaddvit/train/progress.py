"""Live progress with the time left: a bar in a terminal, a line an epoch elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows steps of one stage. Use as a context manager; silent when `show` is False."""

    def __init__(self, title: str, total: int, done: int, show: bool):
        self.console = Console(file=sys.stderr)
        self.title, self.total, self.done, self.first = title, total, done, done
        self.show = show
        self.started = time.monotonic()
        self.bar = None
        if show and self.console.is_terminal:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "TrainingProgress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def note(self, text: str) -> None:
        """The latest loss or accuracy."""
        if self.bar is not None:
            self.bar.update(self.task, note=text)

    def say(self, text: str) -> None:
        """A line of its own, at once."""
        if self.bar is not None:
            self.console.print(f"{self.title}: {text}", markup=False, highlight=False)
        elif self.show:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def epoch(self, text: str) -> None:
        """An epoch ended."""
        if self.bar is not None:
            self.note(text)
        elif self.show:
            rate = (time.monotonic() - self.started) / max(1, self.done - self.first)
            left = rate * (self.total - self.done)
            print(f"{self.title}: {text}, {left:.0f} s left", file=sys.stderr, flush=True)
