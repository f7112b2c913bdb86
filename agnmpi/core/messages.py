"""What travels between a worker and a center: commits, replies, and what a center knows beside c."""

import struct
from collections.abc import Iterable
from math import nan
from typing import NamedTuple

from ..arrays.backend import Array
from .leases import NONE, Lease

# Plain ints, not IntFlags: each `&` of an IntFlag takes 1 µs in Python 3.11, and a message of one number some 50 µs.
# Commit.requests: what a message asks for, besides applying its payload.
# IDLE: this worker holds no steps, whatever the center thinks.
PULL, WORK, LEAVE, SAVE, IDLE = 1, 2, 4, 8, 16
# Commit.flags: what is known of the payload.
# NOT_FINITE: its worker has looked, so that the center need not read it once more.
# MISFIT: no commit to this model; set by the center's end.
NOT_FINITE, MISFIT = 1, 2
# Reply.status
# refused: not finite, or no commit to this model; dropped: of no weight, such as too old
OK, DUPLICATE, REFUSED, DROPPED = 0, 1, 2, 3
# Reply.control; STOP: give back the work in hand, commit what is done, leave. WAIT: no work is free now, but others
# hold some that may become free: ask again.
CONTINUE, STOP, WAIT = 0, 1, 2
_COMMIT = struct.Struct("<12qd")
_REPLY = struct.Struct("<9q")
_SNAPSHOT = struct.Struct("<7q")
_LARGEST = 1 << 42  # bytes of a vector


class Commit(NamedTuple):
    """A message from a worker; without payload a mere request (pull, work, leave)."""

    worker: int
    sequence: int = 0  # of this worker's commits, from 1
    steps: int = 0  # local steps in the payload
    first_step: int = 0  # number of the first of them
    clock: int = 0  # of the center when this worker last pulled
    commits: int = 1  # deltas summed in the payload
    requests: int = 0
    flags: int = 0
    encoding: int = 0  # 0: the vector as it is
    nbytes: int = 0
    total: int = -1  # with WORK and no payload: steps of the session that this rank knows of, -1 without end
    checkpoint: int = 0  # with SAVE: number of the checkpoint that is to be written
    loss: float = nan  # mean training loss over the steps
    payload: Array | None = None

    def encode(self) -> bytes:
        """The header, as it travels."""
        return _COMMIT.pack(*self[:-1])

    @classmethod
    def decode(cls, header: bytes | bytearray) -> "Commit":
        """Read a header; the payload follows on its own. Raises ValueError for another length."""
        if len(header) != _COMMIT.size:
            raise ValueError(f"a commit's header has {_COMMIT.size} bytes, not {len(header)}")
        return cls(*_COMMIT.unpack(header))

    def taken_from(self, worker: int, nbytes: int) -> "Commit":
        """This header as it came from `worker`: with MISFIT if it brings neither nothing nor a vector of `nbytes`.

        Raises ValueError for a length that cannot be: what follows the header cannot be told from later messages.
        """
        if not 0 <= self.nbytes <= _LARGEST:
            raise ValueError(f"worker {worker} announces {self.nbytes} bytes")
        whole = self.nbytes in (0, nbytes) and not self.encoding
        if self.worker == worker and whole and self.steps >= 0 and self.commits == 1:
            return self
        return self._replace(worker=worker, steps=max(self.steps, 0), commits=1, flags=self.flags | MISFIT)


COMMIT_BYTES = _COMMIT.size


class Snapshot(NamedTuple):
    """What a center knows beside c, clock and `applied`: with these it makes a worker able to take over."""

    turn: int = 0  # messages served: of two books the later has more
    session: int = 0
    next: int = 0  # first step that was never granted
    staleness_sum: int = 0
    staleness_max: int = 0
    refused: int = 0
    dropped: int = 0
    open: tuple[Lease, ...] = ()  # steps before `next` that are not committed


def max_open_leases(workers: int) -> int:
    """Number of intervals that a book has room for; with more it does not travel, and nobody can go on from there."""
    return 4 * workers + 64


class Reply(NamedTuple):
    """The center's answer: the clock of the center that travels with it, and what to do next."""

    clock: int
    status: int = OK
    control: int = CONTINUE
    work: Lease = NONE
    steps: int = 0  # local steps in all commits so far
    checkpoint: int = 0  # steps at the newest checkpoint: workers save their state for it
    applied: tuple[int, ...] = ()  # last sequence applied, by worker
    snapshot: Snapshot | None = None  # with c, where workers are to outlive their center

    def encode(self) -> bytes:
        """The header, as it travels."""
        snapshot = self.snapshot
        if snapshot is not None and len(snapshot.open) > max_open_leases(len(self.applied)):
            snapshot = None
        intervals = -1 if snapshot is None else len(snapshot.open)
        fixed = (self.clock, self.status, self.control, *self.work, self.steps, self.checkpoint)
        header = _REPLY.pack(*fixed, len(self.applied), intervals) + _words(self.applied)
        return (
            header
            if snapshot is None
            else header + _SNAPSHOT.pack(*snapshot[:-1]) + _words(n for at in snapshot.open for n in at)
        )

    @classmethod
    def decode(cls, header: bytes | bytearray) -> "Reply":
        """Read a header at the beginning of `header`. Raises ValueError for what no header can be."""
        if len(header) < _REPLY.size:
            raise ValueError(f"a reply's header cannot have {len(header)} bytes")
        clock, status, control, first, count, steps, checkpoint, workers, intervals = _REPLY.unpack_from(header)
        words = workers if intervals < 0 else workers + _SNAPSHOT.size // 8 + 2 * intervals
        if workers < 0 or _REPLY.size + 8 * words > len(header):
            raise ValueError(f"a reply's header of {len(header)} bytes cannot tell of {workers} workers")
        applied = struct.unpack_from(f"<{workers}q", header, _REPLY.size)
        reply = cls(clock, status, control, Lease(first, count), steps, checkpoint, applied)
        if intervals < 0:
            return reply
        at = _REPLY.size + 8 * workers
        said = struct.unpack_from(f"<{2 * intervals}q", header, at + _SNAPSHOT.size)
        intervals_said = tuple(Lease(*pair) for pair in zip(said[::2], said[1::2]))
        snapshot = Snapshot(*_SNAPSHOT.unpack_from(header, at))
        return reply._replace(snapshot=snapshot._replace(open=intervals_said))


def _words(numbers: Iterable[int]) -> bytes:
    numbers = tuple(numbers)
    return struct.pack(f"<{len(numbers)}q", *numbers)


def reply_bytes(workers: int, replicates_state: bool = True) -> int:
    """Most bytes of an encoded Reply; without the center's state, whatever the number of workers."""
    if not replicates_state:
        return _REPLY.size
    return _REPLY.size + 8 * workers + _SNAPSHOT.size + 16 * max_open_leases(workers)
