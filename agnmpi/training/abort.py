"""How a failure of one rank ends the whole job."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from mpi4py import MPI

from ..cluster.placement import fault_tolerant
from ..core.backoff import Orphaned, wait_until
from ..recovery.processes import command
from ..recovery.watchdog import LAUNCHERS, STRANDED
from ..transport.agreement import failed_ranks, format_ranks
from .exits import INTERRUPTED, Interrupted

_pid = os.getpid()


def forked() -> bool:
    """Whether a problem has forked this process from a rank: MPI is its parent's."""
    return os.getpid() != _pid


def say(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error with this rank's name in one write; where it is the loss of others, that alone."""
    text = f"failed, ending the job:\n{''.join(traceback.format_exception(error))}"
    if isinstance(error, MPI.Exception) and fault_tolerant() and (lost := failed_ranks(comm)):
        text = f"ends the job: {format_ranks(sorted(lost))} died, and it needs all of its ranks; resume it\n"
    sys.stdout.flush()
    sys.stderr.write(f"agnmpi: rank {comm.rank} on {MPI.Get_processor_name()} {text}")
    sys.stderr.flush()


def say_and_abort(comm: MPI.Comm, error: BaseException, then: Callable[[], object] = bool) -> None:
    """Print the error, call `then()`, and end the whole job; code 1, or that of a sys.exit.

    A forked process ends alone.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    code = code if isinstance(code, int) and code else 1
    if forked():
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(code)
    say(comm, error)
    try:
        then()
    except Exception:  # a hook of the caller's: the job ends all the same
        traceback.print_exc()
    if isinstance(error, Orphaned):
        os._exit(STRANDED)  # no launcher is left to end the others; each notices
    abort(comm, code)


def abort(comm: MPI.Comm, code: int) -> None:
    """End the whole job, after a moment for pending output."""
    time.sleep(0.5)  # MPICH 5.0.2's hydra may drop what a rank wrote just before MPI_Abort
    if fault_tolerant():
        _end_launcher_later(2, LAUNCHERS)
    elif comm.size == MPI.COMM_WORLD.size:
        comm = MPI.COMM_WORLD  # of a duplicate MPICH 4.0 makes 9 of code 1 now and then, and Intel MPI 2021.18 255
    comm.Abort(code)


def leave_launcher(seconds: float) -> None:
    """End mpiexec if it is still there so long after this rank, in whose job all have come to their end; 0: never.

    Of Open MPI 5.0.11 with ULFM it may lock itself when its ranks have left, most of all with a code other than 0: its
    event loop waits for a mutex of libprrte that no thread holds. What serves several jobs, such as prte, stays.
    """
    if seconds and fault_tolerant() and os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") in ("0", "1"):  # one may be lost
        _end_launcher_later(seconds, ("mpiexec", "mpirun", "prterun"))


def _end_launcher_later(seconds: float, names: Sequence[str]) -> None:
    """Open MPI 5.0's MPI_Abort under ULFM hangs from 4 ranks on, and spares the others: a process of its own ends all.

    No thread could: mpi4py's Abort keeps the interpreter's lock. `names`: of the launchers that may be ended.
    """
    launcher = os.getppid()
    if (name := command(launcher)) in names:
        same = f'[ "$(cat /proc/{launcher}/comm)" = {name} ]'
        wait = f"for _ in $(seq {round(seconds)}); do sleep 1; {same} || exit; done"
        script = f"{wait}; kill -TERM {launcher}; sleep 5; {same} && kill -KILL {launcher}"
        quiet = subprocess.DEVNULL  # else a pipe that mpiexec has inherited would stay open as long
        subprocess.Popen(["sh", "-c", script], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def _end_interrupted(comm: MPI.Comm, error: Interrupted) -> None:
    """End this rank with the code of a run that can be resumed; all ranks do."""
    if comm.rank == 0:
        print(f"agnmpi: {error}: interrupted, and can be resumed", file=sys.stderr, flush=True)
    wait_until(comm.Ibarrier().Test)  # Open MPI ends the job when a first rank exits with an error
    if fault_tolerant():  # MPI cannot be finalized where a rank was lost
        os._exit(INTERRUPTED)
    sys.exit(INTERRUPTED)


class AbortOnException:
    """While installed, an uncaught exception on this rank ends the job instead of leaving the others waiting."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self._previous = comm, sys.excepthook
        self._installed = True
        sys.excepthook = self._hook

    def _hook(self, kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        if self._installed and isinstance(error, Interrupted) and not forked():
            _end_interrupted(self._comm, error)
        elif self._installed and self._comm.size > 1:
            foreign = self._foreign()
            say_and_abort(self._comm, error, lambda: foreign and foreign(kind, error, tb))
        else:  # of one rank; or removed, but still called by a hook installed later
            self._previous(kind, error, tb)

    def _foreign(self) -> "Callable[[type[BaseException], BaseException, TracebackType | None], object] | None":
        """The hook that a solver had installed before, if it is not Python's: it may keep what there is, or log it."""
        hook = self._previous
        while isinstance(owner := getattr(hook, "__self__", None), AbortOnException):
            hook = owner._previous
        return None if hook is sys.__excepthook__ else hook

    def remove(self) -> None:
        """Restore the previous hook."""
        if self._installed and sys.excepthook == self._hook:
            sys.excepthook = self._previous
        self._installed = False
