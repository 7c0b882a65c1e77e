"""Ctrl-C, and the SIGTERM of a batch system, that wait for the step to end."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step was finished and a checkpoint written."""


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only sets a flag (a second one stops at once)."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    mine = os.getpid()

    def handler(number: int, frame: object) -> None:
        if number == signal.SIGTERM and os.getpid() != mine:  # a worker process, whom its parent ends so
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
