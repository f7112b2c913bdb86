"""Signals: what a person or a scheduler asks of a running job."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# The exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL).
INTERRUPTED = 75
_ASKED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop; what is committed is in its newest checkpoint."""


class Signals:
    """While installed, USR1, USR2, TERM and INT ask the run to stop; a second one aborts at once.

    `abort` is called with the exit code. Python calls handlers between two bytecodes of the main thread; nothing of
    ours blocks in MPI, so that is at once.
    """

    def __init__(self, abort: Callable[[int], None]) -> None:
        self.asked: str | None = None  # name of the first signal
        self._abort = abort
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over; from the main thread."""
        for number in _ASKED:
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is not None:
            self._abort(128 + number)
        self.asked = signal.Signals(number).name

    def remove(self) -> None:
        """Give the signals back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
