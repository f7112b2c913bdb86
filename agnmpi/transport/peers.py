"""A worker as the center sees it, with its state, and the vectors that deltas and replies use."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from enum import IntEnum
from itertools import tee
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, empty_like
from ..core.messages import COMMIT_BYTES, MISFIT, Commit
from .chunks import INLINE, PIECE, Stream
from .staging import Wire, cut, make_wire

HEADER, DELTA, REPLY, CENTER_VARIABLE = range(1, 5)  # tags, on a communicator of our own


class Buffer:
    """A vector at the center, the wire that carries it, and the number of replies under way that read it."""

    def __init__(self, x: Array, wire: Wire) -> None:
        self.x, self.wire, self.readers = x, wire, 0
        self._copied: Iterator[Array] = iter(())  # what the wire gives out for the current x, from the beginning

    def outgoing(self) -> Iterator[Array]:
        """Pieces to send; x keeps still while they are read."""
        if not self.readers:
            self._copied = self.wire.outgoing(self.x)
        self._copied, chunks = tee(self._copied)  # each reader waits for the copies of the chunks that it comes to
        return (piece for chunk in chunks for piece in cut(chunk, PIECE))


class Buffers:
    """The message buffers of a center, allocated when first needed.

    `like`: (n,) c; `limit`: how many there may be, besides those in use by silent workers; `allocated`: how many
    there are.
    """

    def __init__(self, like: Array, limit: int, wire: str) -> None:
        self._like, self._limit, self._wire = like, limit, wire
        self._free: list[Buffer] = []
        self.allocated = 0

    def acquire(self, lent: int) -> Buffer | None:
        """Return a buffer, or None if all are in use; `lent`: how many are in use by silent workers."""
        if self._free:
            return self._free.pop()
        if self.allocated - lent >= self._limit:
            return None
        self.allocated += 1
        return Buffer(empty_like(self._like), make_wire(self._like, self._wire))

    def release(self, buffer: Buffer, lent: int) -> None:
        """Make `buffer` free again, or drop it if it only replaced one that a silent worker has returned since."""
        if self.allocated - lent > self._limit:
            self.allocated -= 1
        else:
            self._free.append(buffer)

    def abandon(self) -> None:
        """Do not count one that stays with a dead worker; another may be allocated instead."""
        self.allocated -= 1


def peer_failed(error: MPI.Exception) -> bool:
    """Whether `error` reports a dead peer (ULFM)."""
    error_class: int = error.Get_error_class()
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    return error_class in [getattr(MPI, name) for name in names if hasattr(MPI, name)]


class State(IntEnum):
    """The state of a worker's message; one at a time, later ones wait in `Peer.inbox`."""

    LISTENING = 0  # no message yet
    QUEUED = 1  # the header is here, the delta waits for a buffer
    RECEIVING = 2  # the delta is coming
    READY = 3  # the message is complete
    PARKED = 4  # it requests work, and is answered when there is some
    ANSWERING = 5  # it is being applied, or its reply is on its way
    LEFT = 6  # the worker has left; it is answered when all have left
    LOST = 7  # its worker is dead


class Answer(NamedTuple):
    """A reply under way; `stream`: c, read from `buffer`."""

    header: bytes
    request: MPI.Request
    stream: Stream | None
    buffer: Buffer

    def test(self) -> bool:
        """Make progress; whether it is sent."""
        return self.request.Test() and (self.stream is None or self.stream.test())


class Peer:
    """A worker at the center: its rank in a communicator, and its messages under way.

    A lost one keeps its vectors and requests for good: MPI may still write to them.
    """

    def __init__(self, index: int, comm: MPI.Comm, rank: int) -> None:
        self.index, self.comm, self.rank = index, comm, rank
        self.state = State.LISTENING
        self.inbox: deque[Commit] = deque()  # headers after the current message, with payload if that came inline
        self.commit = Commit(index)  # the current message
        self.buffer: Buffer | None = None  # its delta, until it is applied
        self.delta: Stream | None = None
        self.out: Stream | None = None  # c, sent block by block while the delta is applied
        self.answer: Answer | None = None

    @property
    def buffers_in_use(self) -> set[Buffer]:
        """The vectors that wait for this worker."""
        in_use = {self.buffer} if self.buffer else set()
        return in_use | {self.answer.buffer} if self.answer and self.answer.stream else in_use


class Peers:
    """The workers of a center by state, in each state in order of entry."""

    def __init__(self, peers: list[Peer]) -> None:
        self.all = peers
        # A list, by the number of the state: an Enum as a key of a dict costs 0.5 µs each time.
        self._by_state: list[OrderedDict[Peer, None]] = [OrderedDict() for _ in State]
        for peer in peers:
            self._by_state[peer.state][peer] = None

    def move(self, peer: Peer, state: State) -> None:
        """Move `peer` to a state, after those already in it."""
        del self._by_state[peer.state][peer]
        peer.state = state
        self._by_state[state][peer] = None

    def first(self, state: State) -> Peer | None:
        """The one that has been in this state longest."""
        return next(iter(self._by_state[state]), None)

    def any(self, state: State) -> bool:
        """Whether there is one in this state."""
        return bool(self._by_state[state])

    def at(self, state: State) -> list[Peer]:
        """Those in this state; the list does not change when they do."""
        return list(self._by_state[state])


class Listener:
    """Receives headers, one after the other, from any worker of a communicator; `like`: a vector like c (n,).

    One probe, so that the cost of an empty look does not depend on the number of workers. With ULFM the probe fails
    once for each death and works again: so a worker that dies without any message under way is noticed, too.
    """

    # Alternatives tried with Open MPI 5.0.11 and ULFM: a receive from any source that has once reported a death, and
    # completes before it is tested again, fails at every later test: its header is lost. Testsome on a receive for
    # each worker takes 50-80 µs for 1,000, and where it raises, hides which others are done.

    def __init__(self, comm: MPI.Comm, peers: list[Peer], like: Array) -> None:
        self._comm, self._peers, self._like = comm, {peer.rank: peer for peer in peers}, like
        self._buffer, self._status = bytearray(COMMIT_BYTES + INLINE), MPI.Status()

    def poll(self) -> tuple[Peer, Commit] | None:
        """Return the next header that has arrived, with MISFIT if need be, and with the payload if that came inline."""
        message = self._comm.Improbe(MPI.ANY_SOURCE, HEADER, self._status)
        if message is None:
            return None
        count = self._status.Get_count()
        message.Recv(self._buffer)  # so small that it came with its envelope
        header, inline = self._buffer[:COMMIT_BYTES], bytes(self._buffer[COMMIT_BYTES:count])
        peer = self._peers[self._status.Get_source()]
        commit = Commit.decode(header).received_from(peer.index, self._like.nbytes)
        if inline and len(inline) != commit.nbytes:
            commit = commit._replace(flags=commit.flags | MISFIT)
        if inline:
            dtype = np.dtype(np.uint8) if commit.flags & MISFIT else self._like.dtype
            commit = commit._replace(payload=bring(np.frombuffer(inline, dtype), self._like))
        return peer, commit

    def dead(self) -> list[Peer]:
        """Who has died, after `poll` has failed; acknowledged, so that `poll` works again for the others (ULFM)."""
        failed, group = self._comm.Get_failed(), self._comm.Get_group()
        ranks = failed.Translate_ranks(list(range(failed.size)), group)
        self._comm.Ack_failed(failed.size)
        failed.Free()
        group.Free()
        return [self._peers[rank] for rank in ranks]
