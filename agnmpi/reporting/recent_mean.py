"""A running mean over recent values."""

from collections import deque
from math import fsum, isfinite, nan
from typing import NamedTuple

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
