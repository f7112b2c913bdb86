"""How a run ends: asked by signals, without lost ranks, or by the failure of one rank, which ends the whole job."""

import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mpi4py import MPI

# The exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL).
INTERRUPTED = 75
# The exit code of a run that was completed, but lost workers.
DEGRADED = 76


class Interrupted(Exception):
    """The run was asked to stop; all commits are in its newest checkpoint.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, abort: bool) -> None:
        super().__init__(f"exit code {INTERRUPTED}")
        self.abort = abort


class Degraded(Exception):
    """Ranks were lost, and MPI cannot be finalized any more; leave with exit code `code`.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, code: int, abort: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.abort = code, abort


def say(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error with this rank's name in one write."""
    text = "".join(traceback.format_exception(error))
    place_name = f"rank {comm.rank} on {MPI.Get_processor_name()}"
    sys.stdout.flush()
    sys.stderr.write(f"agnmpi: {place_name} failed, ending the job:\n{text}")
    sys.stderr.flush()


def say_and_abort(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error, and end the whole job; code 1, or that of a sys.exit."""
    say(comm, error)
    code = error.code if isinstance(error, SystemExit) else 1
    abort(comm, code if isinstance(code, int) and code else 1)


def abort(comm: MPI.Comm, code: int) -> None:
    """End the whole job, after a moment for pending output."""
    time.sleep(0.5)  # MPICH 5.0.2's hydra may drop what a rank wrote just before MPI_Abort
    comm.Abort(code)


class AbortOnException:
    """While installed, an uncaught exception on this rank ends the job instead of leaving the others waiting."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self._previous = comm, sys.excepthook
        self._installed = comm.size > 1
        if self._installed:
            sys.excepthook = self._hook

    def _hook(self, kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        if self._installed:
            say_and_abort(self._comm, error)
        else:  # removed, but still called by a hook installed later
            self._previous(kind, error, tb)

    def remove(self) -> None:
        """Restore the previous hook."""
        if self._installed and sys.excepthook == self._hook:
            sys.excepthook = self._previous
        self._installed = False


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
