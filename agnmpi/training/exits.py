"""How a run ends other than with code 0 or 1: stopped by a signal, or with fewer ranks."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# The exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL).
INTERRUPTED = 75
# The exit code of a run that was completed, but lost workers.
DEGRADED = 76

# The exit code of a run that was completed, but whose evaluations failed.
UNEVALUATED = 77


class Interrupted(Exception):
    """The run was asked to stop; all commits are in its newest checkpoint.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, abort: bool) -> None:
        super().__init__(f"exit code {INTERRUPTED}")
        self.abort = abort


class Failed(Exception):
    """The user's code has failed on a rank, which has said how; all commits are in the newest checkpoint.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, ranks: str, abort: bool) -> None:
        super().__init__(f"the run ended because of a failure on {ranks}")
        self.abort = abort


class Degraded(Exception):
    """Ranks were lost, and MPI cannot be finalized any more; leave with exit code `code`.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, code: int, abort: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.abort = code, abort


_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Signals:
    """While installed, USR1, USR2, TERM and INT ask the run to stop; a second one aborts at once.

    `abort` is called with the exit code. Python calls handlers between two bytecodes of the main thread; except
    while survivors regroup nothing of ours blocks in MPI, so a handler runs at once.
    """

    def __init__(self, abort: Callable[[int], None]) -> None:
        self.received: str | None = None  # name of the first signal
        self._abort = abort
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers; from the main thread."""
        for number in _STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            self._abort(128 + number)
        self.received = signal.Signals(number).name

    def remove(self) -> None:
        """Restore the previous handlers."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
