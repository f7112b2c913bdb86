"""Events, a JSON object a line, and means of what is measured on the way."""

import json
import time
from collections import deque
from collections.abc import Callable
from math import fsum, isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

from ..recovery.files import LineFile


def json_safe(value: Any) -> Any:
    """Return `value` with NaN and infinities, which JSON lacks, as None.

    >>> json_safe({"loss": float("nan"), "steps": [1, 2.5]})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class JsonLines:
    """A file of one JSON object per line; each line is flushed, so a killed run leaves complete lines.

    `say`: called where the disk fails, and when that is over; no line is written then, and none raises.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._file = LineFile(path, say)
        self._start = time.monotonic()

    def write(self, event: str, **values: Any) -> None:
        """Append an event with the time (seconds since 1970) and the seconds since the start."""
        stamp = {"event": event, "time": round(time.time(), 3), "seconds": self.seconds()}
        if missing := self._file.write(json.dumps(json_safe(stamp | values), allow_nan=False) + "\n"):
            self.write("unwritten", lines=missing)

    def seconds(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._start, 3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_BINS = 1000


class _Bin(NamedTuple):
    """Adjacent values: their weighted sum, the weight of the finite ones, and of all."""

    total: float
    finite: float
    weight: float


class RecentMean:
    """The weighted mean over the last `span` of weight, to a thousandth of it, in bounded memory and time.

    A value that is not finite counts as missing: it takes part of the span, but not in the mean.

    Args:
        span: weight to look back on, such as the steps of an epoch.

    >>> mean = RecentMean(span=3)
    >>> for value in (9.0, 1.0, float("nan"), 3.0):
    ...     mean.add(value, 1)
    >>> mean.value
    2.0
    """

    def __init__(self, span: float) -> None:
        self._span = span
        self._bins = deque[_Bin]()  # oldest first
        self._weight = 0.0

    def add(self, value: float, weight: float) -> None:
        """Add `value`; values further back than the span are forgotten."""
        if not weight:
            return
        new = _Bin(value * weight, weight, weight) if isfinite(value) else _Bin(0.0, 0.0, weight)
        if self._bins and self._bins[-1].weight < self._span / _BINS:
            last = self._bins.pop()
            new = _Bin(last.total + new.total, last.finite + new.finite, last.weight + new.weight)
        self._bins.append(new)
        self._weight += weight
        while self._weight - self._bins[0].weight >= self._span:
            self._weight -= self._bins.popleft().weight

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._bins

    @property
    def value(self) -> float:
        """The mean; NaN where nothing in the span was finite."""
        weight = fsum(item.finite for item in self._bins)
        return fsum(item.total for item in self._bins) / weight if weight else nan
