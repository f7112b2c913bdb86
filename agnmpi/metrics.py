"""Writers, timers, and means of what is measured on the way."""

import json
import time
from collections import deque
from collections.abc import Callable
from math import isfinite, nan
from pathlib import Path
from typing import Any


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
        self._now = None if steps is not None else now
        self._start = now() if steps is None else 0.0
        self._seen = 0

    def __call__(self, step: float = 0) -> bool:
        """Whether an interval has ended since the last time this was true."""
        at = step if self._now is None else self._now() - self._start
        count = int(at / self._interval + 1e-9)
        due, self._seen = count > self._seen, count
        return due


class RecentMean:
    """The weighted mean over the last `span` of weight.

    >>> mean = RecentMean(span=3)
    >>> for value in (9.0, 1.0, 2.0, 3.0):
    ...     mean.add(value, 1)
    >>> mean.value
    2.0
    """

    def __init__(self, span: float) -> None:
        self._span = span
        self._values: deque[tuple[float, float]] = deque()
        self._weight = 0.0

    def add(self, value: float, weight: float) -> None:
        """Add `value`; what then lies more than the span back is forgotten."""
        if not weight:
            return  # a value of nothing may be NaN
        self._values.append((value, weight))
        self._weight += weight
        while self._weight - self._values[0][1] >= self._span:
            self._weight -= self._values.popleft()[1]

    @property
    def value(self) -> float:
        """The mean; NaN before anything was added."""
        return sum(value * weight for value, weight in self._values) / self._weight if self._weight else nan


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinities, which JSON has no words for, as None.

    >>> finite({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class JsonLines:
    """A file of one JSON object a line; each line is flushed, so a killed run leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._start = time.monotonic()

    def write(self, event: str, **values: Any) -> None:
        """Append an event with the time (seconds since 1970) and the seconds since the start."""
        stamp = {"event": event, "time": round(time.time(), 3), "seconds": self.seconds()}
        self._file.write(json.dumps(finite(stamp | values), allow_nan=False) + "\n")
        self._file.flush()

    def seconds(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._start, 3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
