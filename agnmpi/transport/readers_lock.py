"""The readers' lock of the mailbox: many readers of c, or the center that changes it; one word of shared memory.

The word counts who is within (+1 each), who was kept out and waits (+WAITING each), and whether c is being changed
(+WRITING). All of it moves by atomic additions, so nobody ever blocks in a call: who may not come in is told so.
"""

import time
from collections.abc import Callable
from typing import Protocol

# A million readers within and a million waiting fit beside each other, far more than a communicator has ranks.
WAITING, WRITING = 1 << 20, 1 << 40


class Word(Protocol):
    """A word of memory that all sides reach."""

    def add(self, value: int) -> int:
        """Add `value` at once, and return what was there before."""

    def read(self) -> int:
        """What is there now."""


class ReadersLock:
    """One side's view of the lock: a reader uses `enter`, `enter_behind` and `leave`, the center `lock` and `unlock`.

    Args:
        word: the word, 0 in the beginning.
        courtesy: seconds for which the next `lock` waits for readers that the last one kept out. Without it a reader
            would find c changing ever again at a busy center; without an end to it, a reader that never comes back
            would stop the center.
        clock: seconds, of any beginning.
    """

    def __init__(self, word: Word, courtesy: float = 2e-3, clock: Callable[[], float] = time.perf_counter) -> None:
        self._word, self.courtesy, self._clock = word, courtesy, clock
        self._kept_out = False  # reader: c was changing when it last tried
        self._waits = 0  # reader: WAITING while it is counted among those who wait
        self.locked = False  # center: new readers are kept out
        self._open_until = 0.0  # center: when its courtesy ends

    def enter(self, patient: bool) -> bool:
        """Come in as a reader, unless c is changing; whether this has come in.

        `patient`: it does nothing but wait, so the center should let it in before it changes c once more.
        """
        if self._kept_out and self._word.read() >= WRITING:
            return False  # tried by a look alone, which does not disturb the center that waits for the readers to go
        self._kept_out = self._word.add(1 - self._waits) >= WRITING
        if self._kept_out:
            self._waits = WAITING if patient else self._waits
            self._word.add(self._waits - 1)
            return False
        self._waits = 0
        return True

    def enter_behind(self) -> None:
        """Come in although c is changing, to read the part that is done: the center waits before its next change."""
        self._word.add(1)

    def leave(self) -> None:
        """Be a reader no longer."""
        self._word.add(-1)

    def lock(self) -> bool:
        """Keep new readers out; whether those within have left, so that c may change. Call it until it is true."""
        if self.locked:
            return self._word.read() % WAITING == 0
        if self._clock() < self._open_until and self._word.read() >= WAITING:
            return False
        self.locked = True
        return self._word.add(WRITING) % WAITING == 0

    def unlock(self) -> None:
        """Let readers in again, and for a while first those who were kept out."""
        kept_out = self._word.add(-WRITING) - WRITING >= WAITING
        self._open_until = self._clock() + self.courtesy if kept_out else 0.0
        self.locked = False

    def in_use(self) -> bool:
        """Whether anybody reads c or waits to."""
        return self._word.read() % WRITING > 0
