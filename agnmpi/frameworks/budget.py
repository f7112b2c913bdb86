"""When a run in situ takes time: a budget that is saved up and spent in turns, and rare questions to all ranks."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import ceil, log2
from typing import Self

import numpy as np
from mpi4py import MPI

_SECOND = 1.0  # between two turns, at most, unless a step needs longer
_STEPS = 4  # in a turn, within that second: the first finds the caches full of the caller's data
_OVERHEAD = 0.001  # of the time, that turns may take beside their steps, within that second
_HIGHEST = 20  # level
OFTEN = 0.1  # seconds between two looks, at who goes on and at messages, if time steps are shorter
_SELDOM = 6  # 2^6 readings of `done` between two looks, at most: time steps may become longer


def level(seconds: float, call: float) -> int:
    """The smallest level at which calls that follow each other after `call` seconds have turns `seconds` apart.

    >>> level(1.0, 0.3), level(0.1, 0.3)
    (2, 0)
    """
    return min(_HIGHEST, ceil(log2(max(1.0, seconds / max(call, 1e-9)))))


class Budget:
    """Grants steps a share of the time, in turns. What a turn leaves is kept for one step; what it overdraws is repaid.

    A turn is each call whose number is a multiple of 2^level: ranks that call equally often have theirs together, and
    those of a lower level some more between. In a `with` block of a budget the time counts as used.

    Args:
        now: the clock, in seconds.

    >>> clock = iter([0, 4, 4, 6, 6, 10, 16])
    >>> budget = Budget(lambda: next(clock))
    >>> budget.grant(0.25)  # 1 s of the first 4 s
    True
    >>> budget.allows_step()  # how long one takes is not known yet
    True
    >>> with budget.step():  # it takes 2 s
    ...     pass
    >>> budget.end_turn()
    >>> budget.wanted  # 2 s are a quarter of 8 s, in which there are two calls
    1
    >>> budget.grant(0.25), budget.grant(0.25), budget.allows_step()
    (False, True, True)
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begin = self._granted = self._turn = self._late = self._entered = now()
        self._credit = self._cost = 0.0  # of the steps; of one step, in the mean of the last
        self._saved = self._spare = 0.0  # since the last turn; what that may pay for beside its steps
        self._stepped = self._beside = 0.0  # seconds of the last turn in its steps, and, in the mean, beside them
        self._used = self._share = self._call = 0.0  # the last: seconds from call to call
        self._calls = self._since = 0  # in all; since the last turn
        self.wanted = 0  # the level that suits
        self.agreed: int | None = None  # the level of several budgets

    def grant(self, share: float) -> bool:
        """Grant a share of the time since the last call; whether this one is a turn. From a share of 1 on each is."""
        now, number = self._now(), self._calls
        self._saved += share * (now - self._granted)
        self._granted, self._share, self._calls, self._since = now, share, number + 1, self._since + 1
        # Calls that have become slow are counted anew, before they have waited for a turn of the quick ones.
        if share < 1 and number & ((1 << self._level) - 1) and now < self._late:
            return False
        self._call = (now - self._turn) / self._since
        self._turn, self._since, self._stepped = now, 0, 0.0
        self._credit, self._spare, self._saved = self._credit + self._saved, self._saved / 2, 0.0
        return True

    @property
    def _level(self) -> int:
        return self.wanted if self.agreed is None else self.agreed

    def end_turn(self) -> None:
        """Up to half of the turn pays for what was beside the steps, as messages; of what is left one step is kept.

        The next turns are as far apart as their steps need.
        """
        now = self._now()
        beside = now - self._turn - self._stepped
        self._beside = (self._beside + beside) / 2
        self._credit = min(self._credit - min(beside, self._spare), self._cost)
        step = self._cost / self._share if self._share else 0.0
        apart = max(step, min(_SECOND, max(_STEPS * step, self._beside / _OVERHEAD)))
        self.wanted = level(apart, self._call)
        self._late = now + 4 * max(apart, self._call * 2**self._level)

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
        self._stepped += taken
        self._cost = (self._cost + taken) / 2 if self._cost else taken

    def __enter__(self) -> Self:
        self._entered = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._used += self._now() - self._entered

    @property
    def used(self) -> float:
        """The fraction of all time that was used."""
        return self._used / max(self._now() - self._begin, 1e-9)


class Question:
    """What the ranks of a solver ask each other in some of their readings of `done`: the maxima of three numbers.

    All know from the answers at which reading they ask again.

    Args:
        comm: their communicator, of our own.

    Attributes:
        read: readings so far.
        request: of the question that is under way.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.read = self._next = self._last = 0  # the other two: at the next question, and at the last
        self._since = time.perf_counter()
        self._own, self._all = np.zeros(4, np.int64), np.zeros(4, np.int64)
        self.request: MPI.Request | None = None

    @property
    def is_due(self) -> bool:
        """Whether this reading takes answers, and asks."""
        return self.read >= self._next

    def ask(self, *own: int) -> None:
        """Ask with this rank's numbers."""
        now = time.perf_counter()
        length, self._since = (now - self._since) / max(1, self.read - self._last), now
        # The level below that of OFTEN; at first nobody knows how long a time step takes.
        often = min(_SELDOM, max(0, level(OFTEN, length) - 1)) if self.read else 0
        self._own[:] = *own, _SELDOM - often
        self._last, self.request = self.read, self._comm.Iallreduce(self._own, self._all, MPI.MAX)

    def answers(self) -> list[int]:
        """The maxima, once the request is done."""
        *answers, sooner = self._all.tolist()
        self._next, self.request = self.read + (1 << _SELDOM - sooner), None
        return answers
