"""Waiting that gives the core away: with more ranks than cores, whoever spins steals the time of others."""

import os
import time
from collections.abc import Callable


class Orphaned(Exception):
    """The launcher of this rank has ended: nobody will ever answer."""


class _Launcher:
    """The process that started this rank; 0 as long as nobody watches it."""

    pid = 0


def watch_launcher() -> None:
    """From now on whoever waits for more than a second raises Orphaned once the process that started this one ends.

    With ULFM Open MPI 5.0's mpiexec may end and leave ranks behind.
    """
    _Launcher.pid = os.getppid()


class Backoff:
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
            return
        if quiet > 1.0 and _Launcher.pid and os.getppid() != _Launcher.pid:
            raise Orphaned("the launcher has ended and left this rank behind")
        time.sleep(min(self.cap, quiet / 8))


def wait_until(test: Callable[[], bool], progress: Callable[[], int] = int, spin: float = 1e-3) -> None:
    """Call `test` until it is true, yielding the core in between; a change of `progress()` is no quiet.

    `spin`: seconds of quiet before it sleeps in between.
    """
    backoff, seen = Backoff(spin=spin), progress()
    while not test():
        if (now := progress()) != seen:
            seen = now
            backoff.reset()
        backoff.wait()
