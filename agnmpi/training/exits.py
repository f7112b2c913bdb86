"""How a run ends other than with code 0 or 1: stopped by a signal, or with fewer ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# The exit code of a run that was completed or stopped, but whose last files could not be written (EX_IOERR).
UNWRITTEN = 74
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


class Unwritten(Exception):
    """The run has ended, but its last checkpoint or its result could not be written; it has said why.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, abort: bool) -> None:
        super().__init__(f"exit code {UNWRITTEN}")
        self.abort = abort


class Degraded(Exception):
    """Ranks were lost, and MPI cannot be finalized any more; leave with exit code `code`.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, code: int, abort: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.abort = code, abort


_USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_STOP_SIGNALS = (*_USER_SIGNALS, signal.SIGTERM, signal.SIGINT)


class Signals:
    """While installed, USR1, USR2, TERM and INT ask the run to stop; a second one, a second later, aborts at once.

    Within a second it is the same: a launcher passes on what its ranks may have got as well. Python calls handlers
    between two bytecodes of the main thread; except while survivors regroup nothing of ours blocks in MPI, so a handler
    runs at once.

    A forked child does not inherit the handlers: it would not end at TERM, and `multiprocessing.Pool` would wait for
    it for ever.

    Args:
        abort: called with the exit code.
        several: the process makes several runs: no signal is ignored when the work of one is done.
    """

    def __init__(self, abort: Callable[[int], None], several: bool = False) -> None:
        self.received: str | None = None  # name of the first signal
        self._since = 0.0  # when it came
        self._abort, self._several = abort, several
        self._over = False
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers; from the main thread."""
        for number in _STOP_SIGNALS:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._handle)
        _Forks.signals = self

    def rest(self) -> None:
        """For a while nothing of ours runs: TERM and INT are the caller's again, and others are kept in mind."""
        for number in _STOP_SIGNALS:
            if number not in _USER_SIGNALS:
                self._restore(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._over and number in _USER_SIGNALS:
            return
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > 1.0:
            self._abort(128 + number)

    def over(self) -> None:
        """All work is done: USR1 and USR2 change nothing any more."""
        self._over = not self._several

    def release(self) -> None:
        """At the end of the process, and in a forked child: as `remove`, but USR1 and USR2 are ignored.

        Launchers pass them on to all processes of a rank's group, also in MPI_Finalize; and who loses a task of a pool
        waits for ever.
        """
        self.remove()
        self._ignore_user_signals()

    def _ignore_user_signals(self) -> None:
        for number in _USER_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, signal.SIG_IGN)

    def remove(self) -> None:
        """Restore the previous handlers."""
        _Forks.signals = None
        for number in _STOP_SIGNALS:
            self._restore(number)

    def _restore(self, number: signal.Signals) -> None:
        previous = self._previous.pop(number, None)
        if previous is not None and signal.getsignal(number) == self._handle:  # else another has taken it since
            signal.signal(number, previous)


class _Forks(threading.local):
    """What a fork does with the handlers: no signal comes between it and their removal in the child."""

    signals: Signals | None = None  # installed, in the whole process
    mask: set[int]  # of the thread that forks

    def before(self) -> None:
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS if _Forks.signals else ())

    def after_in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def after_in_child(self) -> None:
        if _Forks.signals is not None:
            _Forks.signals.release()
        self.after_in_parent()


_forks = _Forks()
os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child)
