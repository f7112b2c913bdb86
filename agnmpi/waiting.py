"""Waiting that gives the core away: with more ranks than cores, whoever spins steals the time of others."""

import os
import time
from collections.abc import Callable


class Idle:
    """Waiting that yields the core: first `sched_yield`, then sleeps that grow with the quiet, up to a cap.

    A sleep is an eighth of the quiet so far, so waiting adds at most that part, and never more than `cap`
    seconds and the kernel's wake-up.
    """

    def __init__(self, cap: float = 1e-3, spin: float = 1e-3) -> None:
        self.cap, self.spin = cap, spin
        self._since = time.perf_counter()

    def reset(self) -> None:
        """Something happened."""
        self._since = time.perf_counter()

    def wait(self) -> None:
        """Nothing happened: give the core away for a moment."""
        quiet = time.perf_counter() - self._since
        if quiet < self.spin:
            os.sched_yield()
        else:
            time.sleep(min(self.cap, quiet / 8))


def finish(test: Callable[[], bool], progress: Callable[[], int] = int) -> None:
    """Call `test` until it is true, yielding the core in between; a change of `progress()` is no quiet."""
    idle, seen = Idle(), progress()
    while not test():
        if (now := progress()) != seen:
            seen = now
            idle.reset()
        idle.wait()
