"""A budget of time: how many steps fit into a share of what has passed."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class Budget:
    """Grants steps a share of the time. What is left is kept for one step; what a step overdraws, later ones repay.

    Args:
        now: the clock, in seconds.

    >>> clock = iter([0, 4, 4, 6, 8, 12])
    >>> budget = Budget(lambda: next(clock))
    >>> budget.grant(0.25)  # 1 s of the first 4 s
    >>> budget.allows_step()  # how long one takes is not known yet
    True
    >>> with budget.step():  # it takes 2 s
    ...     pass
    >>> budget.grant(0.25)  # 0 s are left of 8 s
    >>> budget.allows_step()
    False
    >>> budget.grant(0.5)
    >>> budget.allows_step()
    True
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begin = self._granted = now()
        self._credit = self._cost = 0.0  # of the steps; of one step, in the mean of the last
        self._used = 0.0

    def grant(self, share: float) -> None:
        """Grant a share of the time since the last grant."""
        now = self._now()
        self._credit = min(self._credit, self._cost) + share * (now - self._granted)
        self._granted = now

    def allows_step(self) -> bool:
        """Whether a step is granted."""
        return self._credit > 0 and self._credit >= self._cost

    @contextmanager
    def step(self) -> Generator[None, None, None]:
        """The block is a step, and its time is taken from what was granted."""
        begin = self._now()
        yield
        taken = self._now() - begin
        self._credit -= taken
        self._cost = (self._cost + taken) / 2 if self._cost else taken

    @contextmanager
    def using(self) -> Generator[None, None, None]:
        """The time of the block counts as used."""
        begin = self._now()
        try:
            yield
        finally:
            self._used += self._now() - begin

    @property
    def used(self) -> float:
        """The fraction of all time that was used."""
        return self._used / max(self._now() - self._begin, 1e-9)
