"""One-sided ends without a server: workers sum their deltas directly into c, element by element.

TensorFlow's `use_locking=False`, for rules whose commits are added unweighted. Leases are a counter, too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring
from ..core.backoff import wait_until
from ..core.center import PATIENCE
from ..core.division import Division
from ..core.ends import Apply, Cut, Done, Handle, Polled, Summed
from ..core.leases import NONE, Lease, Leases
from ..core.messages import CONTINUE, DUPLICATE, NOT_FINITE, OK, REFUSED, STOP, STOP_ALL, WORK, Commit, Reply
from .readers_lock import ReadersLock
from .staging import MAX_CALL_BYTES, Wire
from .windows import (
    CENTER,
    CHECKPOINT,
    CLOCK,
    CONTROL,
    COUNTS,
    GIVEN_UP,
    LEFT,
    LOSS,
    LOSSES,
    NEXT,
    READERS,
    REFUSALS,
    STALENESS,
    STALEST,
    STEPS,
    ControlWord,
    Windows,
    WindowsCenter,
    WindowsWorker,
)

_HELD = 32  # leases of a worker of which the center knows
_INLINE = 8 * (1 + 2 * _HELD)  # bytes for them, behind the words of a header


class AccumulateWorker(WindowsWorker):
    """A worker's end of transport accumulate (TensorFlow's `use_locking=False`), for rules whose commits are added
    unweighted: an exchange is `Accumulate(SUM)` into c, and `Get`.

    Its limits: sums are atomic per element only, so a pull may contain part of a commit under way; commits are neither
    ordered nor weighed nor refused. Rank 0 need not be in MPI on a machine with shared memory.

    Args:
        comm: of our own; c lies at its rank 0.
        like: a vector like x (n,).
        wire: how vectors are handed to MPI.
        most: bytes per MPI call.
        number: of this worker, where every rank has one, rank 0 too; c begins as rank 0's `like`.
    """

    patience = PATIENCE  # failed commits in a row after which this worker leaves

    def __init__(
        self, comm: MPI.Comm, like: Array, wire: Wire | None = None, most: int = MAX_CALL_BYTES,
        number: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(Windows(comm, like, 0, most, _INLINE, trains=number is not None), wire, number)
        if comm.rank == CENTER:
            self.windows.vector()[...] = like
            self.windows.sync()
        self._lock = ReadersLock(ControlWord(self.windows, READERS))  # the center saves c while nobody has it
        self._division = Division(None, 1, 0, [])
        self._held: list[Lease] = []  # what this worker was granted and has not summed
        self._loss = np.empty(2)  # of a commit: their sum and number
        self._steps, self._staleness = np.empty(1, np.int64), np.empty(1, np.int64)  # of a commit
        self._sequence = self.sessions = self._failed = 0  # failed: commits in a row
        self._stalest = 0  # the largest staleness of all, at the last exchange

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As `WorkerEnd.begin`."""
        self._division = Division.of(work)
        self._held.clear()
        self._show_held()
        self.sessions += 1
        self._failed = 0
        self.windows.begin(total)

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Sum the payload into c, then pull."""
        windows, status, held = self.windows, OK, list(self._held)
        if not self._lock.enter(True):
            wait_until(partial(self._lock.enter, True))
        if commit.payload is not None and commit.sequence <= self._sequence:
            status = DUPLICATE
        elif commit.payload is not None and not commit.flags & NOT_FINITE:
            self._add(commit, commit.payload)
        elif commit.payload is not None:  # the center cannot refuse it
            status, self._failed = REFUSED, self._failed + 1
            windows.add(REFUSALS, 1)
            windows.add(GIVEN_UP, commit.steps)
            self._settle(commit)
        if commit.requests & STOP_ALL:
            windows.add(CONTROL, STOP, MPI.REPLACE)
        head = windows.get(0, COUNTS)
        self._stalest = int(head[STALEST])
        if out is not None:
            windows.pull(self.wire, out)  # a race by design: others may be adding to c
        # It leaves alone: the others may be well.
        control = STOP if self._failed >= self.patience else int(head[CONTROL])
        work = NONE
        if commit.requests & WORK and control != STOP:
            work = self._grant(commit.wanted, int(head[NEXT]))
        if self._held != held:
            self._show_held()  # before the center may save
        self._lock.leave()
        counts = int(head[STEPS]), int(head[CHECKPOINT])
        return Done(Reply(int(head[CLOCK]), status, control, work, *counts, period=self._division.period))

    def _add(self, commit: Commit, payload: Array) -> None:
        windows, center = self.windows, self.windows.center
        windows.push(self.wire, payload, lambda piece, at: center.Accumulate(piece, CENTER, at, MPI.SUM), center)
        self._sequence, self._failed = commit.sequence, 0
        if commit.steps and isfinite(commit.loss):  # before its steps: MPICH 4.0's center looks between any two calls
            self._loss[:] = commit.loss * commit.steps, commit.steps
            windows.sum(LOSS, self._loss)
        self._steps[0] = commit.steps
        windows.sum(STEPS, self._steps)
        self._settle(commit)
        self._staleness[0] = staleness = windows.add(CLOCK, 1) - commit.clock
        windows.sum(STALENESS, self._staleness)
        if staleness > self._stalest:
            windows.add(STALEST, staleness, MPI.MAX)

    def _grant(self, wanted: int, granted: int) -> Lease:
        pieces = self._division.fair(wanted, granted, self.windows.workers)
        lease = self._division.lease(self.windows.add(NEXT, pieces), pieces)
        if lease.steps:
            self._held.append(lease)
        return lease

    def _settle(self, commit: Commit) -> None:
        """The steps of `commit` are done; the rest of their leases is this worker's."""
        if not self._held:
            return
        for done in commit.leases:
            i = [lease.first for lease in self._held].index(done.first)
            rest = Lease(done.end, self._held[i].end - done.end)
            self._held[i : i + 1] = [rest] if rest.steps else []

    def _show_held(self) -> None:
        """Tell the center what this worker holds, for checkpoints."""
        words = [len(self._held), *(number for lease in self._held[:_HELD] for number in lease)]
        self.windows.put(self.windows.header(self.worker), np.array(words, np.int64).tobytes())

    def pull(self, out: Array) -> Handle:
        """Get c, even while others add to it."""
        return self.exchange(Commit(self.worker), out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Sum the last commit, and wait for the others."""
        if commit is not None:
            self.exchange(commit, None)
        self.windows.add(LEFT, 1)
        return Polled(partial(self._last_pull, self.sessions * self.windows.workers, out))

    def _last_pull(self, until: int, out: Array | None, _blocking: bool) -> Reply | None:
        """The final center, as soon as `until` workers have left."""
        return self.exchange(Commit(self.worker), out).wait() if self.windows.read(LEFT) >= until else None


class AccumulateCenter(WindowsCenter):
    """The center's end of transport accumulate: holds the memory and reads the counters; memory: c alone.

    Nothing can be put on hold here: workers add to c themselves.
    """

    def __init__(self, comm: MPI.Comm, c: Array, most: int = MAX_CALL_BYTES) -> None:
        super().__init__(Windows(comm, c, 0, most, _INLINE), c)
        self._lock = ReadersLock(ControlWord(self.windows, READERS))
        self._division: Division | None = None  # of the last session
        self._left = self._sessions = 0
        self._seen = [0, 0, 0]  # clock, steps and those given up that were already reported to `apply`
        self._given_up = 0  # steps before this session
        self._start: Array | None = None  # what the next session starts from, if not from c as it is
        self._losses = 0.0, 0.0  # their sum and number, at the last call
        self._announced = (CONTINUE, -1)  # control, checkpoint

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return self._sessions * self.windows.workers - self._left

    @property
    def summed(self) -> Summed:
        """Refused commits and their steps, sum and maximum of the staleness of all."""
        return Summed(*(self.windows.read(word) for word in (REFUSALS, STALENESS, STALEST, GIVEN_UP)))

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As `CenterEnd.begin`."""
        self._division, self._given_up = Division.of(work), self.windows.read(GIVEN_UP)
        self.windows.words[[NEXT, CONTROL]] = 0, CONTINUE  # NEXT counts leases
        self._announced = (CONTINUE, -1)
        self.windows.sync()
        self.windows.begin(total, self._set_start)

    @contextmanager
    def still(self) -> Iterator[Cut]:
        """As `CenterEnd.still`; waits for the sums under way."""
        wait_until(self._locked)
        self.windows.sync()
        try:
            clock, steps, given_up = (self.windows.read(word) for word in (CLOCK, STEPS, GIVEN_UP))
            yield Cut(clock, steps, given_up, self._leases())
        finally:
            self._lock.unlock()

    def _locked(self) -> bool:
        self.windows.comm.Iprobe()  # progress for sums from other hosts
        return self._lock.lock()

    def _leases(self) -> Mapping[str, Any] | None:
        windows, held = self.windows, list[Lease]()
        if self._division is None:
            return None
        for worker in range(windows.workers):
            count, *numbers = windows.words[windows.header(worker) :][: 1 + 2 * _HELD].tolist()
            if count > _HELD:
                raise OSError(f"worker {worker} holds {count} leases, but the center can know of {_HELD}")
            held += [Lease(*numbers[2 * i : 2 * i + 2]) for i in range(count)]
        return self._division.state(windows.read(NEXT), held, given_up=windows.read(GIVEN_UP) - self._given_up)

    def start_from(self, c: Array) -> None:
        """Let the next session start from `c`, once all have read the final center of the last."""
        self._start = c

    def _set_start(self) -> None:
        if self._start is not None:
            self._c[...] = bring(self._start, self._c)
            self.windows.sync()
            self._start = None

    def announce(self, control: int, checkpoint: int) -> None:
        """Set `control` and `checkpoint` of later replies, where they change: a worker may have set STOP."""
        if (control, checkpoint) != self._announced:
            self._announced, words = (control, checkpoint), self.windows.words
            words[[CONTROL, CHECKPOINT]] = max(control, int(words[CONTROL])), checkpoint
            self.windows.sync()

    def resume(self, clock: int, steps: int, summed: Summed) -> None:
        """Restore the counts of a checkpoint."""
        self.windows.words[[CLOCK, STEPS, GIVEN_UP]] = self._seen = [clock, steps, summed.given_up]
        self.windows.words[[REFUSALS, STALENESS, STALEST]] = summed[:3]
        self.windows.sync()

    def open(self) -> None:
        """Begin a session of all workers; `begin` has prepared its work."""
        self._sessions += 1

    def serve_one(self, apply: Apply) -> bool:
        """Report to `apply` what was summed since the last call, as one commit without payload."""
        windows = self.windows
        windows.comm.Iprobe()  # progress for what comes from other hosts
        if not windows.shared and windows.read(READERS):
            self.progress += 1
        left = windows.read(LEFT)  # before the clock: who has left has committed
        seen = [windows.read(word) for word in (CLOCK, STEPS, GIVEN_UP)]
        commits, done, given_up = (now - before for now, before in zip(seen, self._seen))
        if commits or done or given_up:
            windows.sync()
            first, self._seen = self._seen[1], seen
            loss, losses = map(float, windows.words.view(np.float64)[LOSS : LOSSES + 1])  # not of these steps alone
            mean = (loss - self._losses[0]) / (losses - self._losses[1]) if losses > self._losses[1] else float("nan")
            self._losses = loss, losses
            apply(Commit(0, steps=done, first_step=first, commits=commits, loss=mean), self._c)
        self._left = left
        return commits > 0
