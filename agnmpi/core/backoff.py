"""Waiting that yields the core: with more ranks than cores, spinning takes time from other ranks; periodic events."""

import math
import os
import threading
import time
from collections.abc import Callable

_SHORTEST = 1e-9  # of an interval, in steps or seconds: below it a count of intervals may not be finite


class Orphaned(Exception):
    """The launcher of this rank has ended: no reply will ever come."""


class _Watch:
    """What is watched in this process."""

    launcher = 0  # the process that started this rank; 0: not watched
    long_wait: Callable[[float], None] | None = None


def watch_launcher() -> None:
    """From now on a rank that waits, or has taken a step, raises Orphaned once the process that started it has ended.

    With ULFM Open MPI 5.0's mpiexec may end and leave ranks behind; so does any that is killed.
    """
    _Watch.launcher = _Watch.launcher or os.getppid()


def check_launcher() -> None:
    """Raise Orphaned if the launcher is watched, and has ended."""
    if _Watch.launcher and os.getppid() != _Watch.launcher:
        raise Orphaned("the launcher has ended and left this rank behind")


def on_long_wait(call: Callable[[float], None]) -> None:
    """From now on `call(seconds without progress)` is called in each wait of more than a second, often."""
    _Watch.long_wait = call


def limit() -> float:
    """Seconds without progress after which a rank looks who is gone or hangs: AGNMPI_WATCHDOG, default 60; 0: never."""
    text = os.environ.get("AGNMPI_WATCHDOG") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"AGNMPI_WATCHDOG must be a number of seconds, not {text!r}")
    return seconds


class _Pace(threading.local):
    cap = spin = 1e-3


_pace = _Pace()


def set_pace(cap: float, spin: float) -> None:
    """From now on these are the defaults of `Backoff` in this thread."""
    _pace.cap, _pace.spin = cap, spin


class Backoff:
    """Waiting that yields the core: first `sched_yield`, then sleeps that grow with the idle time, up to a cap.

    A sleep is an eighth of the idle time so far, so waiting adds at most that fraction, and never more than `cap`
    seconds and the kernel's wake-up latency; or a 32nd, up to `longest` seconds.

    Args:
        cap: seconds; by default 1 ms, or what the thread has set.
        spin: seconds before it sleeps; likewise.
        longest: seconds; by default `cap`.
    """

    def __init__(self, cap: float | None = None, spin: float | None = None, longest: float = 0.0) -> None:
        self.cap = _pace.cap if cap is None else cap
        self.spin = _pace.spin if spin is None else spin
        self.longest = longest
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
        if idle > 1.0:
            check_launcher()
            if _Watch.long_wait is not None:
                _Watch.long_wait(idle)
        time.sleep(min(idle / 8, max(self.cap, min(idle / 32, self.longest))))


def wait_until(
    test: Callable[[], bool],
    progress: Callable[[], int] = int,
    spin: float | None = None,
    cap: float | None = None,
) -> None:
    """Call `test` until it is true, yielding the core in between; a change of `progress()` resets the backoff.

    `spin`, `cap`: as of `Backoff`.
    """
    backoff, seen = Backoff(cap, spin), progress()
    while not test():
        if (now := progress()) != seen:
            seen = now
            backoff.reset()
        backoff.wait()


class StandsStill:
    """Whether a count of progress has not changed for AGNMPI_WATCHDOG seconds.

    >>> StandsStill()(0)
    False
    """

    def __init__(self) -> None:
        self._seen, self._since = -math.inf, 0.0

    def __call__(self, progress: int) -> bool:
        """Whether `progress` has been the same since so long ago; call it again and again."""
        now = time.monotonic()
        if progress != self._seen:
            self._seen, self._since = progress, now
        return now - self._since >= (limit() or math.inf)


class Every:
    """True once in each interval of steps or seconds, counted from the start.

    >>> due = Every(steps=10)
    >>> [due(n) for n in (4, 9, 10, 12, 31, 35)]
    [False, False, True, False, True, False]
    """

    def __init__(
        self,
        *,
        steps: float | None = None,
        seconds: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if (steps is None) == (seconds is None):
            raise ValueError("give either steps or seconds")
        self._interval: float = steps if steps is not None else seconds or 0.0
        if self._interval <= 0:
            raise ValueError(f"an interval must be positive, not {self._interval}")
        self._interval = max(self._interval, _SHORTEST)
        self._now = None if steps is not None else now
        self._start = now() if steps is None else 0.0
        self._seen = 0

    def __call__(self, step: float = 0) -> bool:
        """Whether an interval has ended since the last time this was true."""
        elapsed = step if self._now is None else self._now() - self._start
        count = int(elapsed / self._interval + 1e-9)
        due, self._seen = count > self._seen, count
        return due
