"""How long a step of training takes, said while the first slow one is under way."""

import time
from collections.abc import Callable

PATIENCE = 3.0
"""Seconds of a step after which something is said."""


class Pace:
    """Says once, inside a step that takes long, how long it will take; a step is never cut."""

    def __init__(self, rays: int, minutes: float | None = None, say: Callable[[str], None] = lambda _: None):
        self.rays, self.minutes, self.say = rays, minutes, say
        self.started, self.first, self.told = 0.0, (0, 0.0), False

    def start(self) -> None:
        """A step begins."""
        self.started, self.first = time.monotonic(), (0, 0.0)

    def seen(self, done: int) -> None:
        """`done` rays of the step are done."""
        passed = time.monotonic() - self.started
        if self.told or done >= self.rays:
            return
        if done <= self.first[0] or not self.first[0]:  # the first chunk has the feature net before it, and warm-up
            self.first = (done, passed)
        elif passed > PATIENCE:
            before, since = self.first
            whole = passed + (self.rays - done) * (passed - since) / (done - before)
            self.told = True
            self.say(f"a step takes about {whole:.0f} s here{self._limit(whole)}; fewer rays, samples or sources, or smaller pictures, make it faster")

    def _limit(self, whole: float) -> str:
        if self.minutes is None or whole < 60 * self.minutes:
            return ""
        return f", longer than the {60 * self.minutes:.0f} s asked for: a step is not cut, so training ends after it, with a model"
