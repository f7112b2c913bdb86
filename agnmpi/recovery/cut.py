"""One consistent cut over several centers: a checkpoint in which all blocks hold the same commits.

Each center has a block of the center variable and applies the workers' commits in its own order. For a cut rank 0 asks
all of them to start no further delta (HOLD). Each applies those in flight, and reports which commits it has processed
(PROCESSED), by worker. The largest number of each worker is the target: a commit that one center has processed is on
its way to all others. With the target (TARGET) each center processes commits up to it, holds later ones, copies its
block when it has reached the target, and goes on. Nobody waits for the disk, and a worker whose commit is held only
gets its reply later.

No further message is needed at the end of a session: rank 0 leaves the other centers last, and until then they serve.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from mpi4py import MPI

from ..core.backoff import wait_until
from ..core.center import Center
from ..core.ends import CenterEnd
from ..core.messages import Commit

Say: TypeAlias = Callable[[str], None]

# Kinds of messages; each begins with its kind and the checkpoint's number.
_HOLD, _PROCESSED, _TARGET, _WRITTEN, _STUCK, _GIVE_UP, _GIVEN_UP = range(7)
_TAG = 11


class Mail(Protocol):
    """Messages of a few numbers between the centers; ordered per pair of centers."""

    @property
    def rank(self) -> int:
        """Of this center."""

    @property
    def size(self) -> int:
        """Number of centers."""

    def send(self, rank: int, words: Sequence[int]) -> None:
        """Send to a center, or to itself, without blocking."""

    def receive(self) -> tuple[int, Sequence[int]] | None:
        """The source of a message that has arrived, and the message; None if there is none."""


class MPIMail:
    """Mail over the communicator of the centers."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size
        self._under_way: list[tuple[MPI.Request, np.ndarray[tuple[int], np.dtype[np.int64]]]] = []
        self._to_self = deque[Sequence[int]]()
        self._status = MPI.Status()

    def send(self, rank: int, words: Sequence[int]) -> None:
        """Send without blocking."""
        if rank == self.rank:
            self._to_self.append(words)
            return
        buffer = np.array(words, np.int64)
        self._under_way.append((self._comm.Isend(buffer, rank, _TAG), buffer))

    def receive(self) -> tuple[int, Sequence[int]] | None:
        """Receive a message that has arrived."""
        self._under_way = [sent for sent in self._under_way if not sent[0].Test()]
        if self._to_self:
            return self.rank, self._to_self.popleft()
        status = self._status
        if not self._comm.Iprobe(MPI.ANY_SOURCE, _TAG, status):
            return None
        source, buffer = status.source, np.empty(status.Get_count(MPI.INT64_T), np.int64)
        self._comm.Recv(buffer, source, _TAG)
        return source, buffer.tolist()


def everything(_commit: Commit) -> bool:
    """Hold all commits."""
    return True


class ConsistentCut:
    """A center's part in the cuts; at rank 0 also their coordinator. Only `finish` blocks.

    Args:
        mail: between the centers.
        end: this center's, which can hold commits.
        center: whose `processed` counts.
        save: copies this center's block for the checkpoint of that number, and starts to write it.
        writing: whether that is still under way.
        say: called with a warning when a cut is given up.
        patience: seconds without a commit after which a cut is given up, and the workers go on: one of them has
            stopped between its messages to the centers.
        now: the clock.
        name: describes a center.
    """

    def __init__(
        self,
        mail: Mail,
        end: CenterEnd,
        center: Center,
        save: Callable[[int], None],
        writing: Callable[[], bool],
        say: Say = print,
        patience: float = 30.0,
        now: Callable[[], float] = time.monotonic,
        name: Callable[[int], str] = "center {}".format,
    ) -> None:
        self._mail, self._end, self._center, self._say, self._name = mail, end, center, say, name
        self._save, self._writing, self._patience, self._now = save, writing, patience, now
        self._number: int | None = None  # of the cut that this center is in, until its block is written
        self._phase: Callable[[], None] | None = None  # called at each tick
        self._target: Mapping[int, int] = {}  # last commit to apply before the cut, by worker
        self._since, self._last_progress = 0.0, self._progress()
        # Rank 0:
        self._active: int | None = None  # the cut that it coordinates, until all blocks are written or given up
        self._processed: dict[int, Sequence[int]] = {}  # by center
        self._ended = set[int]()  # centers that have finished
        self._gave_up = False

    @property
    def busy(self) -> bool:
        """At rank 0: whether a cut is under way, or a block of it is still being written."""
        return self._active is not None

    def begin(self, number: int) -> None:
        """At rank 0, while it is not busy: begin a cut; each center will call `save(number)`."""
        if self.busy:
            raise ValueError(f"the cut for checkpoint {self._active} is still under way")
        self._active, self._gave_up = number, False
        self._processed.clear()
        self._ended.clear()
        self._send_all(_HOLD, number)

    def tick(self) -> None:
        """Receive messages, and make progress. Call it repeatedly, between two messages of workers."""
        while (message := self._mail.receive()) is not None:
            source, (kind, number, *words) = message
            if kind in (_HOLD, _TARGET, _GIVE_UP):
                self._participate(kind, number, words)
            elif number == self._active:
                self._coordinate(source, kind, words)
        if self._phase is not None:
            self._phase()

    def finish(self) -> None:
        """At rank 0, when its workers have left, and before it leaves the other centers: complete a cut."""

        def done() -> bool:
            self.tick()
            return not self.busy

        wait_until(done)

    # Every center.

    def _participate(self, kind: int, number: int, words: Sequence[int]) -> None:
        if kind == _HOLD:
            self._number = number
            self._end.hold = everything
            self._enter(self._drain)
        elif number != self._number:  # given up after this block was written
            self._answer(_GIVEN_UP, number)
        elif kind == _TARGET and self._phase is not None:
            self._target = dict(enumerate(words))
            self._end.hold = self._beyond
            self._enter(self._reach)
        elif kind == _GIVE_UP:
            self._release()
            self._phase = self._abandon

    def _beyond(self, commit: Commit) -> bool:
        """Whether `commit` comes after the cut."""
        return commit.sequence > self._target.get(commit.worker, 0)

    def _enter(self, phase: Callable[[], None] | None) -> None:
        self._phase, self._since, self._last_progress = phase, self._now(), self._progress()

    def _progress(self) -> int:
        return sum(self._center.processed.values())

    def _drain(self) -> None:
        if self._end.in_flight_deltas:
            self._check_patience()
            return
        assert self._number is not None
        processed = self._center.processed
        self._answer(_PROCESSED, self._number, [processed.get(worker, 0) for worker in range(self._center.workers)])
        self._enter(self._await_target)

    def _await_target(self) -> None:
        """It arrives by mail."""

    def _reach(self) -> None:
        if any(self._center.processed.get(worker, 0) < last for worker, last in self._target.items()):
            self._check_patience()
            return
        self._copy()

    def _copy(self) -> None:
        assert self._number is not None
        try:
            self._save(self._number)
        finally:
            self._release()
        self._phase = self._write

    def _release(self) -> None:
        self._end.hold = None

    def _write(self) -> None:
        if not self._writing():
            assert self._number is not None
            self._answer(_WRITTEN, self._number)
            self._number = self._phase = None

    def _abandon(self) -> None:
        """Given up; a block that was already copied is still written, and pruned with its checkpoint."""
        if not self._writing():
            assert self._number is not None
            self._answer(_GIVEN_UP, self._number)
            self._number = self._phase = None

    def _check_patience(self) -> None:
        progress = self._progress()
        if progress != self._last_progress:
            self._since, self._last_progress = self._now(), progress
        elif self._now() - self._since > self._patience:
            assert self._number is not None
            self._answer(_STUCK, self._number)
            self._since = self._now()

    def _answer(self, kind: int, number: int, words: Sequence[int] = ()) -> None:
        self._mail.send(0, [kind, number, *words])

    # Rank 0.

    def _coordinate(self, source: int, kind: int, words: Sequence[int]) -> None:
        assert self._active is not None
        if kind == _PROCESSED:
            self._processed[source] = words
            if len(self._processed) == self._mail.size and not self._gave_up:
                self._send_all(_TARGET, self._active, [max(column) for column in zip(*self._processed.values())])
        elif kind == _STUCK and not self._gave_up:
            self._gave_up = True
            self._ended.clear()
            self._say(
                f"WARNING: no checkpoint at step {self._active}: for {self._patience:g} s {self._name(source)} has "
                "waited for a commit that another center has; training goes on"
            )
            self._send_all(_GIVE_UP, self._active)
        elif kind == (_GIVEN_UP if self._gave_up else _WRITTEN):
            self._ended.add(source)
            if len(self._ended) == self._mail.size:
                self._active = None

    def _send_all(self, kind: int, number: int, words: Sequence[int] = ()) -> None:
        for rank in range(self._mail.size):
            self._mail.send(rank, [kind, number, *words])
