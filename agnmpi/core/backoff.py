"""Waiting that yields the core: with more ranks than cores, spinning takes time from other ranks."""

import os
import time
from collections.abc import Callable


class Orphaned(Exception):
    """The launcher of this rank has ended: no reply will ever come."""


class _Launcher:
    """The process that started this rank; 0 while it is not watched."""

    pid = 0


def watch_launcher() -> None:
    """From now on a wait of more than a second raises Orphaned once the process that started this one has ended.

    With ULFM Open MPI 5.0's mpiexec may end and leave ranks behind.
    """
    _Launcher.pid = os.getppid()


class Backoff:
    """Waiting that yields the core: first `sched_yield`, then sleeps that grow with the idle time, up to a cap.

    A sleep is an eighth of the idle time so far, so waiting adds at most that fraction, and never more than `cap`
    seconds and the kernel's wake-up latency.
    """

    def __init__(self, cap: float = 1e-3, spin: float = 1e-3) -> None:
        self.cap, self.spin = cap, spin
        self._since = time.perf_counter()

    def reset(self) -> None:
        """There was progress."""
        self._since = time.perf_counter()

    def wait(self) -> None:
        """There was no progress: yield the core for a moment."""
        idle = time.perf_counter() - self._since
        if idle < self.spin:
            os.sched_yield()
            return
        if idle > 1.0 and _Launcher.pid and os.getppid() != _Launcher.pid:
            raise Orphaned("the launcher has ended and left this rank behind")
        time.sleep(min(self.cap, idle / 8))


def wait_until(test: Callable[[], bool], progress: Callable[[], int] = int, spin: float = 1e-3) -> None:
    """Call `test` until it is true, yielding the core in between; a change of `progress()` resets the backoff.

    `spin`: idle seconds before it sleeps in between.
    """
    backoff, seen = Backoff(spin=spin), progress()
    while not test():
        if (now := progress()) != seen:
            seen = now
            backoff.reset()
        backoff.wait()
