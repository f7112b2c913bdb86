"""The mean of what is measured on the way."""

from collections import deque
from math import nan


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
