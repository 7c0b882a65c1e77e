"""How long a step of training takes, said while the first slow one is under way; a slow step ends at the limit of time."""

import time
from collections.abc import Callable

PATIENCE = 3.0
"""Seconds of a step, after what comes once, in which its pace is found."""


class Pace:
    """Says once, inside a step that takes long, how long it will take."""

    def __init__(self, rays: int, minutes: float | None = None, say: Callable[[str], None] = lambda _: None):
        self.rays, self.minutes, self.say = rays, minutes, say
        self.started, self.first, self.end, self.told = 0.0, (0, 0.0), 0.0, False
        self.cut: int | None = None

    def start(self, spent: float) -> None:
        """A step begins, after `spent` seconds of training."""
        self.started, self.first, self.cut = time.monotonic(), (0, 0.0), None
        self.end = float("inf") if self.minutes is None else 60 * self.minutes - spent

    def seen(self, done: int) -> bool:
        """`done` rays of the step are done; whether a step known to be slow must end here, at the limit. `cut` is then their number."""
        passed = time.monotonic() - self.started
        if done >= self.rays:
            return False
        before, since = self.first
        if done <= before or not before:  # the first chunk has the feature net before it, and warm-up
            self.first = (done, passed)
        elif not self.told and passed - since > PATIENCE:
            self.told = True
            self._tell(passed + (self.rays - done) * (passed - since) / (done - before))
        if not self.told or passed < self.end:
            return False
        self.cut = done
        return True

    def _tell(self, whole: float) -> None:
        limit = ""
        if whole > self.end:
            limit = f", longer than the {60 * self.minutes:.0f} s asked for: it ends at the limit, with the rays done by then"
        self.say(f"a step takes about {whole:.0f} s here{limit}; fewer rays, samples or sources, or smaller pictures, make it faster")
