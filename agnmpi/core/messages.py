"""The messages between a worker and a center: commits, replies, and the snapshot of a center's state beside c."""

import struct
from collections.abc import Iterable, Sequence
from math import nan
from typing import NamedTuple

from ..arrays.backend import Array
from .leases import MAX_PARTS, NONE, Lease

# Plain ints, not IntFlags: each `&` of an IntFlag takes 1 µs in Python 3.11, and a message of one number some 50 µs.
# Commit.requests: what a message asks for, besides applying its payload.
# IDLE: this worker holds no steps, whatever the center thinks; it waits for work, if others hold some.
# ENCODED: c is to come in the encoding of pulls.
# STOP_ALL: this worker has failed, or wants no more: all are to stop.
# SPARE: it is answered when a worker is lost, whose place it then takes, or when all have left.
PULL, WORK, LEAVE, IDLE, ENCODED, STOP_ALL, SPARE = 1, 2, 4, 8, 16, 32, 64
# Commit.flags: what is known of the payload.
# NOT_FINITE: its worker has checked it, so that the center need not read it again.
# MISFIT: not a commit to this model; set by the center's end.
NOT_FINITE, MISFIT = 1, 2
# Reply.status
# refused: not finite, or not a commit to this model; dropped: of weight 0, such as too old
OK, DUPLICATE, REFUSED, DROPPED = 0, 1, 2, 3
# Reply.control; STOP: commit the steps done, return the rest of the lease, leave. WAIT: no work is free now, but other
# workers hold leases that may become free: a request with IDLE is answered then. UNCALLED: to a spare, when all have
# left.
CONTINUE, STOP, WAIT, UNCALLED = 0, 1, 2, 3
_COMMIT = struct.Struct("<13qdq")
_REPLY = struct.Struct("<10q")
_SNAPSHOT = struct.Struct("<8q")
_MAX_BYTES = 1 << 42  # of a vector


class Commit(NamedTuple):
    """A message from a worker; without payload only a request (pull, work, leave).

    Args:
        worker: index of the sender, 0 … n−1.
        sequence: number of this commit among its worker's, from 1.
        steps: local steps in the payload.
        first_step: number of the first of them, over the whole run.
        clock: of the center when this worker last pulled.
        commits: deltas summed in the payload.
        requests: PULL, WORK, LEAVE, IDLE, ENCODED, STOP_ALL, SPARE.
        flags: NOT_FINITE, MISFIT.
        encoding: of the payload, its number; 0: the vector as it is.
        nbytes: of the payload.
        total: with WORK and no payload, this rank's number of steps in the session; -1 without end.
        wanted: with WORK, how many periods of λ steps it asks for at once.
        samples: that this worker's own data have had so far; 0: all workers draw from the same.
        loss: mean training loss over the steps.
        parts: the steps in the payload, where they are not consecutive: of several leases, or of several workers.
        payload: the delta (n,); sent separately, after the header.
        origin: o and k, where the payload is x and the delta (x − o)/k: for ends that form it (`forms_deltas`).

    >>> Commit.decode(Commit(1, sequence=5, steps=3, loss=0.5).encode()).steps
    3
    """

    worker: int
    sequence: int = 0
    steps: int = 0
    first_step: int = 0
    clock: int = 0
    commits: int = 1
    requests: int = 0
    flags: int = 0
    encoding: int = 0
    nbytes: int = 0
    total: int = -1
    wanted: int = 1
    samples: int = 0
    loss: float = nan
    parts: tuple[Lease, ...] = ()
    payload: Array | None = None
    origin: tuple[Array, int] | None = None

    @property
    def leases(self) -> tuple[Lease, ...]:
        """The steps in the payload, in order."""
        return self.parts or (Lease(self.first_step, self.steps),)

    def encode(self) -> bytes:
        """The header, as it is sent."""
        return _COMMIT.pack(*self[:-3], len(self.parts)) + _int64s(n for part in self.parts for n in part)

    @classmethod
    def decode(cls, header: bytes | bytearray) -> "Commit":
        """Read a header; the payload is a message of its own. Raises ValueError for another length."""
        commit, rest = cls.split(header)
        if rest:
            raise ValueError(f"a commit's header has {len(header) - len(rest)} bytes, not {len(header)}")
        return commit

    @classmethod
    def split(cls, message: bytes | bytearray) -> "tuple[Commit, bytes | bytearray]":
        """Read the header at the beginning of `message`, and return the rest. Raises ValueError if it is not whole."""
        if len(message) < _COMMIT.size:
            raise ValueError(f"a commit's header cannot have {len(message)} bytes")
        *numbers, parts = _COMMIT.unpack_from(message)
        stop = _COMMIT.size + 16 * parts
        if not 0 <= parts <= len(message) or stop > len(message):
            raise ValueError(f"a commit's header of {len(message)} bytes cannot have {parts} parts")
        commit = cls(*numbers)
        if parts:
            words = struct.unpack_from(f"<{2 * parts}q", message, _COMMIT.size)
            commit = commit._replace(parts=tuple(map(Lease, words[::2], words[1::2])))
        return commit, message[stop:]

    def received_from(self, worker: int, sizes: Sequence[int]) -> "Commit":
        """This header as it came from `worker`: with MISFIT unless its payload is empty or a vector of this model.

        `sizes`: bytes of a vector in each encoding that is understood, by number.

        Raises ValueError for an impossible length: then the payload cannot be separated from later messages.
        """
        if not 0 <= self.nbytes <= _MAX_BYTES:
            raise ValueError(f"worker {worker} announces {self.nbytes} bytes")
        fits = self.nbytes == 0 or (0 <= self.encoding < len(sizes) and self.nbytes == sizes[self.encoding])
        fits &= not self.parts or sum(part.steps for part in self.parts) == self.steps
        if self.worker == worker and fits and self.steps >= 0 and self.commits >= 1:
            return self
        return self._replace(worker=worker, steps=max(self.steps, 0), commits=1, parts=(), flags=self.flags | MISFIT)


COMMIT_BYTES = _COMMIT.size + 16 * MAX_PARTS  # most of a worker's header


class Snapshot(NamedTuple):
    """A center's state beside c, clock and `applied`: with all of these a worker can take over as center.

    Args:
        served: messages; of two snapshots the later has more.
        session: number of the session.
        next: first step that was never granted.
        staleness_sum, staleness_max: of the applied commits.
        refused, dropped: commits.
        given_up: steps of this session that are never granted again.
        open: steps before `next` that are neither committed nor given up.
    """

    served: int = 0
    session: int = 0
    next: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    refused: int = 0
    dropped: int = 0
    given_up: int = 0
    open: tuple[Lease, ...] = ()


def max_open_leases(workers: int) -> int:
    """Most intervals of a snapshot that is sent; one with more is left out, and nobody can take over from it."""
    return (MAX_PARTS + 2) * workers + 64


class Reply(NamedTuple):
    """The center's answer: the clock of the center that comes with it, and what to do next.

    Args:
        clock: commits applied so far.
        status: of the commit: OK, DUPLICATE, REFUSED, DROPPED.
        control: CONTINUE, STOP, WAIT.
        work: the lease granted, NONE without.
        period: with it, λ of this worker.
        steps: local steps in all commits so far.
        checkpoint: steps at the newest checkpoint; workers save their state for it.
        applied: last sequence applied, by worker; sent with c, and only where a worker may have to take over.
        snapshot: likewise.

    >>> Reply.decode(Reply(3, work=Lease(4, 2)).encode())[:4]
    (3, 0, 0, Lease(first=4, steps=2))
    """

    clock: int
    status: int = OK
    control: int = CONTINUE
    work: Lease = NONE
    steps: int = 0
    checkpoint: int = 0
    period: int = 1
    applied: tuple[int, ...] = ()
    snapshot: Snapshot | None = None

    def encode(self) -> bytes:
        """The header, as it is sent."""
        snapshot = self.snapshot
        if snapshot is not None and len(snapshot.open) > max_open_leases(len(self.applied)):
            snapshot = None
        intervals = -1 if snapshot is None else len(snapshot.open)
        fixed = (self.clock, self.status, self.control, *self.work, self.steps, self.checkpoint, self.period)
        header = _REPLY.pack(*fixed, len(self.applied), intervals) + _int64s(self.applied)
        if snapshot is None:
            return header
        return header + _SNAPSHOT.pack(*snapshot[:-1]) + _int64s(n for lease in snapshot.open for n in lease)

    @classmethod
    def decode(cls, header: bytes | bytearray | memoryview) -> "Reply":
        """Read a header at the beginning of `header`. Raises ValueError for an invalid header."""
        if len(header) < _REPLY.size:
            raise ValueError(f"a reply's header cannot have {len(header)} bytes")
        clock, status, control, first, count, steps, checkpoint, period, workers, intervals = _REPLY.unpack_from(header)
        count64 = workers if intervals < 0 else workers + _SNAPSHOT.size // 8 + 2 * intervals
        if workers < 0 or _REPLY.size + 8 * count64 > len(header):
            raise ValueError(f"a reply's header of {len(header)} bytes cannot describe {workers} workers")
        applied = struct.unpack_from(f"<{workers}q", header, _REPLY.size)
        reply = cls(clock, status, control, Lease(first, count), steps, checkpoint, period, applied)
        if intervals < 0:
            return reply
        at = _REPLY.size + 8 * workers
        numbers = struct.unpack_from(f"<{2 * intervals}q", header, at + _SNAPSHOT.size)
        snapshot = Snapshot(*_SNAPSHOT.unpack_from(header, at))
        return reply._replace(snapshot=snapshot._replace(open=tuple(map(Lease, numbers[::2], numbers[1::2]))))


def _int64s(numbers: Iterable[int]) -> bytes:
    numbers = tuple(numbers)
    return struct.pack(f"<{len(numbers)}q", *numbers) if numbers else b""  # most headers carry none


def reply_bytes(workers: int, replicates_state: bool) -> int:
    """Most bytes of an encoded Reply; `replicates_state`: a worker may have to take over."""
    if not replicates_state:
        return _REPLY.size
    return _REPLY.size + 8 * workers + _SNAPSHOT.size + 16 * max_open_leases(workers)
