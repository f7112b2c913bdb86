"""Events, a JSON object a line, and means of what is measured on the way."""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from math import exp, fsum, inf, isfinite, nan
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

    Args:
        path: the file.
        then: takes each object, too.
        say: called where the disk fails, and when that is over; lines are missing then, and none raises.
    """

    def __init__(
        self,
        path: Path,
        then: Callable[[Mapping[str, Any]], object] = bool,
        say: Callable[[str], None] = print,
    ) -> None:
        self._file, self._then = LineFile(path, say), then
        self._start = time.monotonic()

    def write(self, event: str, **values: Any) -> None:
        """Append an event with the time (seconds since 1970) and the seconds since the start."""
        stamp = {"event": event, "time": round(time.time(), 3), "seconds": self.seconds()}
        line = json_safe(stamp | values)
        if missing := self._file.write(json.dumps(line, allow_nan=False) + "\n"):
            self.write("unwritten", lines=missing)
        self._then(line)

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


class Pace:
    """How fast steps are done lately, and what time is left.

    Lately: steps and seconds count e^(−age/τ); τ: a tenth of the run, 5 mean intervals between steps, at least 30 s.
    They are added where steps were done, so that the rate does not sink between two commits; a pause counts at most τ.

    Args:
        now: seconds, when the run begins.
        steps: done before that.

    >>> pace = Pace(0.0, 0)
    >>> for at in range(1, 101):
    ...     pace.add(at, 2 * at)
    >>> pace.left(100.0, 400.0), pace.left(105.0, 400.0), pace.left(150.0, 400.0), pace.since(150.0)
    (100.0, 95.0, None, 50.0)
    """

    def __init__(self, now: float, steps: int) -> None:
        self._seen, self._steps, self._all = now, steps, 0.0  # when the newest steps were; their number; all seconds
        self._sums: tuple[float, ...] = 0.0, 0.0, 0.0  # steps, seconds, times that steps were added

    def add(self, now: float, steps: int) -> None:
        """At `now`, `steps` are done altogether."""
        if steps == self._steps:
            return
        _, passed, times = self._sums
        span = max(30.0, self._all / 10, 5 * passed / times if times else now - self._seen)
        seconds = min(now - self._seen, span)
        new, kept = (steps - self._steps, seconds, 1), exp(-seconds / span)
        self._sums = tuple(old * kept + more for old, more in zip(self._sums, new))
        self._seen, self._steps, self._all = now, steps, self._all + seconds

    def since(self, now: float) -> float:
        """Seconds without steps, where these are too many to be usual; else 0."""
        _, passed, times = self._sums
        seconds = now - self._seen
        return seconds if times and seconds > max(10.0, 3 * passed / times) else 0.0

    def left(self, now: float, total: float) -> float | None:
        """Seconds until `total` steps are done; None where nobody knows."""
        done, passed, _ = self._sums
        if not done or passed <= 0 or total == inf or self.since(now):
            return None
        return max(passed * (total - self._steps) / done - (now - self._seen), 0.0)


class RecentRates:
    """What was counted per second, over the last `span` seconds; further back, where nothing was counted in these.

    >>> rates = RecentRates(span=10)
    >>> [rates.add(at, (count,)) for at, count in ((0, 0), (1, 0), (5, 10), (20, 40), (45, 40))][1:]
    [(0.0,), (2.0,), (2.0,), (0.75,)]
    """

    def __init__(self, span: float = 10.0) -> None:
        self._span = span
        self._seen = deque[tuple[float, tuple[int, ...]]]()

    def add(self, now: float, counts: tuple[int, ...]) -> tuple[float, ...]:
        """The rates at `now`, seconds, when `counts` have been counted altogether."""
        self._seen.append((now, counts))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._span and self._seen[1][1] != counts:
            self._seen.popleft()
        then, before = self._seen[0]
        seconds = max(now - then, 1e-9)
        return tuple((count - old) / seconds for count, old in zip(counts, before))
