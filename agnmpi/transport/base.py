"""The contract between a worker, a center and whatever carries their messages."""

import struct
import time
from collections.abc import Callable, Iterable
from functools import partial
from math import nan
from typing import NamedTuple, Protocol, TypeAlias

from ..backend import Array
from ..data import NONE, Lease
from ..waiting import finish

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


class Elected(Exception):
    """Raised by a handle: the center is lost, and this rank is to serve now instead of training."""


class Capabilities(NamedTuple):
    """What an end gives; launch refuses a rule on a transport that lacks what the rule needs."""

    server: bool  # a center rank applies commit by commit; else all ranks step together
    whole_pulls: bool = True
    exact_clock: bool = True
    weights: bool = True
    center_optimizer: bool = True
    refusal: bool = False  # of commits that are not finite
    replay: bool = True
    survives_loss: bool = False


# Applies a commit (or serves a request) to the center variable c, in place, and answers.
Apply: TypeAlias = Callable[[Commit, Array], Reply]


class Handle(Protocol):
    """An exchange under way."""

    def test(self) -> bool:
        """Make progress without blocking; whether the exchange is done."""

    def wait(self) -> Reply:
        """Finish the exchange; may be called again."""


class WorkerEnd(Protocol):
    """A worker's side. One exchange at a time; the payload must not change before its handle is done."""

    capabilities: Capabilities

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Send `commit`; pull the center (n,) as it is afterwards into `out`, unless None."""

    def pull(self, out: Array) -> Handle:
        """Pull the center (n,) into `out`; it includes this worker's earlier commits."""

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """End this worker's part with a last commit, if any, without blocking.

        The handle is done when all workers have left, with the final center in `out`.
        """

    def close(self) -> None:
        """Free what the end holds; collective."""


class CenterEnd(Protocol):
    """The center's side; it owns the memory of the center variable."""

    @property
    def c(self) -> Array:
        """(n,) the center variable; it may move in memory from turn to turn."""

    @property
    def live(self) -> int:
        """Workers that have not left this session."""

    @property
    def progress(self) -> int:
        """A number that changes whenever a message, or a piece of one, has come or gone."""

    def open(self) -> None:
        """Begin a session: all workers are expected."""

    def serve_one(self, apply: Apply) -> bool:
        """Make progress and serve at most one message; whether one was served."""

    def close(self) -> None:
        """Free what the end holds; collective."""


class InTurn:
    """Several exchanges of one worker, sent one behind the other; the reply is the last one's."""

    def __init__(self, *handles: Handle) -> None:
        self._handles = handles

    def test(self) -> bool:
        """Make progress on all; whether all are done."""
        return sum([handle.test() for handle in self._handles]) == len(self._handles)

    def wait(self) -> Reply:
        """Finish all."""
        return [handle.wait() for handle in self._handles][-1]


class Polled:
    """A handle that asks `attempt(patient)` until it gives the reply; patient is who has nothing else to do."""

    def __init__(self, attempt: Callable[[bool], Reply | None]) -> None:
        self._attempt = attempt
        self._reply: Reply | None = None

    def _try(self, patient: bool) -> bool:
        if self._reply is None:
            self._reply = self._attempt(patient)
        return self._reply is not None

    def test(self) -> bool:
        """Ask once more, if need be; whether the reply is there."""
        return self._try(False)

    def wait(self) -> Reply:
        """Ask until the reply is there."""
        finish(partial(self._try, True))
        assert self._reply is not None
        return self._reply


class Pause:
    """A handle that is done when some seconds are over."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def test(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._until

    def wait(self) -> Reply:
        """Sleep until then."""
        time.sleep(max(0.0, self._until - time.monotonic()))
        return Reply(0)


class Done:
    """The handle of an exchange that needed no waiting."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def test(self) -> bool:
        """Always true."""
        return True

    def wait(self) -> Reply:
        """Return the reply."""
        return self._reply
