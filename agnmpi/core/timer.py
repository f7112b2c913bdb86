"""Periodic events."""

import time
from collections.abc import Callable

_SHORTEST = 1e-9  # of a step, or a second: below it a count of intervals may not be finite


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
