"""Signals that ask a run to stop."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_ASKED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Signals:
    """While installed, USR1, USR2, TERM and INT ask the run to stop; a second one aborts at once.

    `abort` is called with the exit code. Python calls handlers between two bytecodes of the main thread; but for the
    moments in which membership regroup nothing of ours blocks in MPI, so that is at once.
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
