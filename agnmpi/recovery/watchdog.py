"""The watchdog of last resort: a rank that waits for what is gone ends itself, and says where it was.

It looks only while a rank is in a wait or a blocking MPI call of ours, never while it computes. MPI or the launcher
ends a job of which a rank has died, or reports it; this is for where they do not. Open MPI 5.0 with ULFM reports no
rank that exits with a code other than 0, and its mpiexec may end and leave ranks behind.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NoReturn

from mpi4py import MPI

from ..core.backoff import limit, on_long_wait, watch_launcher
from ..transport.agreement import allgather, raise_on_all
from .processes import Process, command

# The exit code of a rank that the watchdog has ended (EX_UNAVAILABLE).
STRANDED = 69
LAUNCHERS = ("mpiexec", "mpirun", "orterun", "prterun", "prte", "prted", "orted")


class Watchdog:
    """Watches this rank's waits; of several in a process the newest.

    Args:
        peers: the process of each rank.
        awaited: the ranks for which this one may be waiting now, without those that are known to be lost.
        seconds: without progress; 0: never look.
        end: called with what is gone; in any thread.
    """

    current: "Watchdog | None" = None

    def __init__(
        self,
        peers: Sequence[Process],
        awaited: Callable[[], Iterable[int]],
        seconds: float,
        end: Callable[[str], object],
    ) -> None:
        self.peers, self.awaited, self._seconds, self._end = peers, awaited, seconds, end
        self._launcher = os.getppid()
        self._next = 0.0

    def start(self) -> None:
        """Watch from now on."""
        if self._seconds:
            Watchdog.current = self
            on_long_wait(self._waited)

    def _waited(self, idle: float) -> None:
        now = time.monotonic()
        if idle < self._seconds or now < self._next:
            return
        self._next = now + 1.0
        if who := self._missing(self.awaited()):
            self._end(f"has waited for {idle:.0f} s, and {who}")

    def _missing(self, awaited: Iterable[int]) -> str:
        """What is gone that this rank may be waiting for; empty if nothing is known to be."""
        if os.getppid() != self._launcher:
            return f"the launcher, process {self._launcher}, has ended"
        gone = [rank for rank in awaited if self.peers[rank].is_gone]
        return f"rank {gone[0]}, process {self.peers[gone[0]].pid}, has ended" if gone else ""

    def _stopped(self, awaited: Iterable[int]) -> set[int]:
        return {rank for rank in awaited if self.peers[rank].is_stopped}

    @contextmanager
    def calling(self, name: str, awaited: Sequence[int]) -> Iterator[None]:
        """A blocking MPI call, which waits for the ranks `awaited`, and fails or goes on if one dies.

        Those that are stopped as long, on this host, are killed: it would wait for them as long as they are.
        """
        returned = threading.Event()

        def look() -> None:
            gone, stopped = self._missing(awaited), self._stopped(awaited)
            while not returned.wait(self._seconds):
                before, gone = gone, self._missing(awaited)
                if before and gone:  # MPI has had the time to notice
                    self._end(f"has been in {name} for more than {self._seconds:g} s, and {gone}")
                since, stopped = stopped, self._stopped(awaited)
                for rank in since & stopped:
                    sys.stderr.write(f"agnmpi: rank {rank} is stopped, and holds up {name}: it is killed\n")
                    self.peers[rank].end()

        threading.Thread(target=look, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            returned.set()


def watch(comm: MPI.Comm, awaited: Callable[[], Iterable[int]] | None = None) -> Watchdog | None:
    """Watch this rank's waits from now on, if there are others; collective.

    Args:
        comm: the ranks.
        awaited: as of `Watchdog`; default: all.

    Raises:
        ConfigError: on all ranks, for an invalid AGNMPI_WATCHDOG.
    """
    if comm.size == 1:
        return None
    watch_launcher()
    seconds = raise_on_all(comm, limit)
    peers = [Process(*json.loads(text)) for text in allgather(comm, json.dumps(Process.this()))]
    dog = Watchdog(peers, awaited or partial(range, comm.size), seconds, partial(end_stranded, comm.rank))
    dog.start()
    return dog


def calling(name: str, awaited: Sequence[int]) -> AbstractContextManager[None]:
    """A blocking MPI call, which waits for the ranks `awaited`, watched if this process has a watchdog."""
    return Watchdog.current.calling(name, awaited) if Watchdog.current else nullcontext()


def end_stranded(rank: int, why: str) -> NoReturn:
    """Say why, with the stacks of all threads, and end this rank and its launcher."""
    sys.stdout.flush()
    sys.stderr.write(f"agnmpi: rank {rank} {why}: the watchdog ends it, with exit code {STRANDED}\n")
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    time.sleep(0.5)  # for the launcher to pass it on
    end_launcher()
    os._exit(STRANDED)


def end_launcher() -> None:
    """Ask Open MPI's launcher, if it is this rank's parent, to end all ranks."""
    if command(os.getppid()).partition(".")[0] in LAUNCHERS:  # mpiexec.openmpi is Debian's
        os.kill(os.getppid(), signal.SIGTERM)
