"""A readers-writer lock for the mailbox: many readers of c, or the center that changes it; one word of shared memory.

The word counts the readers that hold the lock (+1 each), those that were refused and wait (+WAITING each), and whether
c is being changed (+WRITING). It changes by atomic additions only, so no call ever blocks: it may return False.
"""

import time
from collections.abc import Callable
from typing import Protocol

# Room for a million readers and a million waiting, far more than a communicator has ranks.
WAITING, WRITING = 1 << 20, 1 << 40


class Word(Protocol):
    """A word of memory that all sides can access."""

    def add(self, value: int) -> int:
        """Add `value` atomically, and return the old value."""

    def read(self) -> int:
        """The value, read atomically."""


class ReadersLock:
    """One side's view of the lock: a reader uses `enter`, `enter_behind` and `leave`, the center `lock` and `unlock`.

    Args:
        word: the word, initially 0.
        courtesy: seconds for which the next `lock` waits for readers that the last one refused. Without it a busy
            center would starve readers; without a limit, a reader that never returns would block the center.
        clock: seconds, of any origin.
    """

    def __init__(self, word: Word, courtesy: float = 2e-3, clock: Callable[[], float] = time.perf_counter) -> None:
        self._word, self.courtesy, self._clock = word, courtesy, clock
        self._refused = False  # reader: c was changing at its last attempt
        self._waits = 0  # reader: WAITING while it is counted as waiting
        self.locked = False  # center: new readers are refused
        self._open_until = 0.0  # center: when its courtesy ends

    def enter(self, blocking: bool) -> bool:
        """Acquire the lock as a reader, unless c is changing; whether it was acquired.

        `blocking`: the caller only waits, so the center should let it in before it changes c again.
        """
        if self._refused and self._word.read() >= WRITING:
            return False  # a read only: an addition would disturb the center while it waits for the readers
        self._refused = self._word.add(1 - self._waits) >= WRITING
        if self._refused:
            self._waits = WAITING if blocking else self._waits
            self._word.add(self._waits - 1)
            return False
        self._waits = 0
        return True

    def enter_behind(self) -> None:
        """Acquire it although c is changing, to read the part that is done: the center waits before its next change."""
        self._word.add(1)

    def leave(self) -> None:
        """Release the lock as a reader."""
        self._word.add(-1)

    def lock(self) -> bool:
        """Refuse new readers; whether all readers have left, so that c may change. Call it until it is true."""
        if self.locked:
            return self._word.read() % WAITING == 0
        if self._clock() < self._open_until and self._word.read() >= WAITING:
            return False
        self.locked = True
        return self._word.add(WRITING) % WAITING == 0

    def unlock(self) -> None:
        """Admit readers again, and for a while first those that were refused."""
        refused = self._word.add(-WRITING) - WRITING >= WAITING
        self._open_until = self._clock() + self.courtesy if refused else 0.0
        self.locked = False

    def in_use(self) -> bool:
        """Whether any reader holds the lock or waits for it."""
        return self._word.read() % WRITING > 0
