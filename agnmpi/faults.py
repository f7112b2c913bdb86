"""What happens to a running job: signals, lost ranks, and faults injected by tests."""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import nan
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .backend import Array
from .transport.base import Commit, Handle, WorkerEnd

# The exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL).
INTERRUPTED = 75
# That of a run which went to its end, but lost workers on the way.
DEGRADED = 76
_ASKED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop; what is committed is in its newest checkpoint.

    `abort`: other ranks hang, and have to be ended, too.
    """

    def __init__(self, abort: bool) -> None:
        super().__init__(f"exit code {INTERRUPTED}")
        self.abort = abort


class Degraded(Exception):
    """Ranks were lost, and MPI cannot be finalized any more; leave with exit code `code`.

    `abort`: other ranks hang, and have to be ended, too.
    """

    def __init__(self, code: int, abort: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.abort = code, abort


def fault_tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's `mpiexec --with-ft ulfm`, or AGNMPI_FT=1 for others."""
    return "1" in (environment.get("OMPI_MCA_mpi_ft_enable"), environment.get("AGNMPI_FT"))


def process() -> tuple[int, int, str]:
    """What tells this process from all others: its number, its parent's, and where these numbers hold."""
    where = ""
    with suppress(OSError):  # not everywhere to be read; then nobody is taken for a sibling
        where = Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    return os.getpid(), os.getppid(), where


def end_sibling(pid: int, parent: int, where: str) -> None:
    """Kill a rank that hangs, if it runs here under the same launcher.

    With ULFM, Open MPI's MPI_Abort may spare it; without, MPI_Abort is better: the exit code is ours.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return  # it is of another host, or has ended
    theirs = int(stat[stat.rindex(")") + 2 :].split()[1])
    if where and (theirs, parent, where) == (os.getppid(), os.getppid(), process()[2]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Signals:
    """While installed, USR1, USR2, TERM and INT ask the run to stop; a second one aborts at once.

    `abort` is called with the exit code. Python calls handlers between two bytecodes of the main thread; but for the
    moments in which survivors regroup nothing of ours blocks in MPI, so that is at once.
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


class Fault(NamedTuple):
    """One injected fault; `at`: local steps (exchanges, for "cut" and "drop") of that rank before it."""

    kind: str
    rank: int
    at: int
    seconds: float = 0.0


def read_faults(text: str) -> list[Fault]:
    """Read `KIND:RANK@AT[:SECONDS],…`.

    Kinds: kill, cut (killed in an exchange), stall, slow, corrupt, drop (a commit that never arrives).

    >>> read_faults("kill:2@40,slow:1@0:0.01")
    [Fault(kind='kill', rank=2, at=40, seconds=0.0), Fault(kind='slow', rank=1, at=0, seconds=0.01)]
    """
    faults = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(kill|cut|stall|slow|corrupt|drop):(\d+)@(\d+)(?::([\d.]+))?", item)
        if match is None:
            raise ValueError(f"fault {item!r}: give KIND:RANK@AT[:SECONDS], such as kill:2@40")
        kind, rank, at, seconds = match.groups()
        faults.append(Fault(kind, int(rank), int(at), float(seconds or 0)))
    return faults


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Injection:
    """The faults of one rank, for tests."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._steps = 0

    def step(self) -> None:
        """To be called before each local step (on a center rank: before each commit)."""
        for fault in self._faults:
            if fault.kind == "kill" and fault.at == self._steps:
                _die()
            elif (fault.kind == "stall" and fault.at == self._steps) or (
                fault.kind == "slow" and fault.at <= self._steps
            ):
                time.sleep(fault.seconds)
        self._steps += 1

    def wrap(self, end: WorkerEnd) -> WorkerEnd:
        """An end in whose exchanges this rank dies, or loses its commit, if any fault says so."""
        faults = [fault for fault in self._faults if fault.kind in ("cut", "drop")]
        return _FaultyEnd(end, faults) if faults and not isinstance(end, _FaultyEnd) else end

    def spoil(self, g: Array) -> None:
        """To be called with the gradient of the step."""
        if any(fault.kind == "corrupt" and fault.at == self._steps - 1 for fault in self._faults):
            g[0] = nan


class _FaultyEnd:
    def __init__(self, end: WorkerEnd, faults: list[Fault]) -> None:
        self._end, self._faults, self._exchanges, self._total = end, faults, 0, -1
        self.capabilities = end.capabilities

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        if commit.payload is None:
            self._total = commit.first
            return self._end.exchange(commit, out)
        kinds = {fault.kind for fault in self._faults if fault.at == self._exchanges}
        self._exchanges += 1
        if "drop" in kinds:  # as if it had never been sent; the steps stay leased until this worker leaves
            commit = Commit(commit.worker, first=self._total, wants=commit.wants)
        handle = self._end.exchange(commit, out)
        if "cut" in kinds:
            handle.test()
            _die()
        return handle

    def pull(self, out: Array) -> Handle:
        return self._end.pull(out)

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        return self._end.leave(commit, out)

    def close(self) -> None:
        self._end.close()
