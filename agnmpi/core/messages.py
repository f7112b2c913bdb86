"""What travels between a worker and a center: commits, replies, and what a center knows beside c."""

import struct
from collections.abc import Iterable
from math import nan
from typing import NamedTuple

from ..arrays.backend import Array
from .leases import NONE, Lease

# What a message to the center asks for, besides applying its payload.
# BAD: the payload is not finite; its worker has looked, so that the center need not read it once more.
# IDLE: this worker holds no steps, whatever the center thinks.
# MISFIT: no commit to this model; set by the center's end.
PULL, WORK, LEAVE, SAVE, BAD, IDLE, MISFIT = 1, 2, 4, 8, 16, 32, 64
# Reply.status
# refused: not finite, or no commit to this model; dropped: of no weight, such as too old
OK, DUPLICATE, REFUSED, DROPPED = 0, 1, 2, 3
# Reply.control; STOP: give back the work in hand, commit what is done, leave. WAIT: no work is free now, but others
# hold some that may become free: ask again.
CONTINUE, STOP, WAIT = 0, 1, 2
_COMMIT = struct.Struct("<9qd")
_REPLY = struct.Struct("<9q")
_BOOK = struct.Struct("<7q")
_LARGEST = 1 << 42  # bytes of a vector


class Commit(NamedTuple):
    """A message from a worker; without payload a mere request (pull, work, leave)."""

    worker: int
    sequence: int = 0  # of this worker's commits, from 1
    steps: int = 0  # local steps in the payload
    first: int = 0  # number of the first of them
    clock: int = 0  # of the center when this worker last pulled
    commits: int = 1  # deltas summed in the payload
    wants: int = 0
    encoding: int = 0  # 0: the vector as it is
    nbytes: int = 0
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
        return self._replace(worker=worker, steps=max(self.steps, 0), commits=1, wants=self.wants | MISFIT)


COMMIT_BYTES = _COMMIT.size


class Book(NamedTuple):
    """What a center knows beside c, clock and `applied`: with these it makes a worker able to take over."""

    turn: int = 0  # messages served: of two books the later has more
    session: int = 0
    next: int = 0  # first step that was never granted
    staleness_sum: int = 0
    staleness_max: int = 0
    refused: int = 0
    dropped: int = 0
    open: tuple[Lease, ...] = ()  # steps before `next` that are not committed


def most_open(workers: int) -> int:
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
    book: Book | None = None  # with c, where workers are to outlive their center

    def encode(self) -> bytes:
        """The header, as it travels."""
        book = self.book
        if book is not None and len(book.open) > most_open(len(self.applied)):
            book = None
        intervals = -1 if book is None else len(book.open)
        fixed = (self.clock, self.status, self.control, *self.work, self.steps, self.checkpoint)
        header = _REPLY.pack(*fixed, len(self.applied), intervals) + _words(self.applied)
        return header if book is None else header + _BOOK.pack(*book[:-1]) + _words(n for at in book.open for n in at)

    @classmethod
    def decode(cls, header: bytes | bytearray) -> "Reply":
        """Read a header at the beginning of `header`. Raises ValueError for what no header can be."""
        if len(header) < _REPLY.size:
            raise ValueError(f"a reply's header cannot have {len(header)} bytes")
        clock, status, control, first, count, steps, checkpoint, workers, intervals = _REPLY.unpack_from(header)
        words = workers if intervals < 0 else workers + _BOOK.size // 8 + 2 * intervals
        if workers < 0 or _REPLY.size + 8 * words > len(header):
            raise ValueError(f"a reply's header of {len(header)} bytes cannot tell of {workers} workers")
        applied = struct.unpack_from(f"<{workers}q", header, _REPLY.size)
        reply = cls(clock, status, control, Lease(first, count), steps, checkpoint, applied)
        if intervals < 0:
            return reply
        at = _REPLY.size + 8 * workers
        said = struct.unpack_from(f"<{2 * intervals}q", header, at + _BOOK.size)
        intervals_said = tuple(Lease(*pair) for pair in zip(said[::2], said[1::2]))
        book = Book(*_BOOK.unpack_from(header, at))
        return reply._replace(book=book._replace(open=intervals_said))


def _words(numbers: Iterable[int]) -> bytes:
    numbers = tuple(numbers)
    return struct.pack(f"<{len(numbers)}q", *numbers)


def reply_bytes(workers: int) -> int:
    """Most bytes of an encoded Reply."""
    return _REPLY.size + 8 * workers + _BOOK.size + 16 * most_open(workers)
