"""A worker as the center sees it, with its state, and the vectors that deltas and replies use."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from enum import IntEnum
from functools import partial
from itertools import tee
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, empty, to_host
from ..arrays.encodings import Encoding, encode_pull, sizes
from ..core.messages import COMMIT_BYTES, ENCODED, MISFIT, PULL, SPARE, Commit, Reply
from .agreement import failed_ranks
from .chunks import INLINE, PIECE, Stream, Ticks, discarded
from .staging import Wire, cut, make_wire

HEADER, DELTA, REPLY, CENTER_VARIABLE = range(1, 5)  # tags, on a communicator of our own


class Buffer:
    """A vector at the center, the wire that carries it, and the number of replies under way that read it.

    `pool`: takes it back when nobody needs it.
    """

    def __init__(self, x: Array, wire: Wire, pool: "Buffers") -> None:
        self.x, self.wire, self.pool, self.readers = x, wire, pool, 0
        self.delta = x  # what is received into x: all of it, or the bytes of an encoded delta
        self._copied: Iterator[Array] = iter(())  # what the wire gives out for the current x, from the beginning

    def outgoing(self) -> Iterator[Array]:
        """Pieces to send; x keeps still while they are read."""
        if not self.readers:
            self._copied = self.wire.outgoing(self.x)
        self._copied, chunks = tee(self._copied)  # each reader waits for the copies of the chunks that it comes to
        return (piece for chunk in chunks for piece in cut(chunk, PIECE))


class Buffers:
    """Vectors at a center, allocated when first needed, where c lies.

    `c`: (n,); `size`, `dtype`: of each, as c's by default; `limit`: how many there may be, besides those in use by
    silent workers; `allocated`: how many there are.
    """

    def __init__(self, c: Array, limit: int, wire: str, size: int | None = None, dtype: str | None = None) -> None:
        self._c, self._limit, self._wire = c, limit, wire
        self._size, self._dtype = c.size if size is None else size, dtype or c.dtype
        self._free: list[Buffer] = []
        self.allocated = 0

    def acquire(self, lent: int) -> Buffer | None:
        """Return a buffer, or None if all are in use; `lent`: how many are in use by silent workers."""
        if not self.available(lent):
            return None
        if self._free:
            return self._free.pop()
        self.allocated += 1
        return Buffer(empty(self._size, self._dtype, self._c), make_wire(self._c, self._wire), self)

    def available(self, lent: int) -> bool:
        """Whether `acquire` would return one."""
        return bool(self._free) or self.allocated - lent < self._limit

    def release(self, buffer: Buffer, lent: int) -> None:
        """Make `buffer` free again, or drop it if it only replaced one that a silent worker has returned since."""
        if self.allocated - lent > self._limit:
            self.allocated -= 1
        else:
            self._free.append(buffer)

    def abandon(self) -> None:
        """Do not count one that stays with a dead worker; another may be allocated instead."""
        self.allocated -= 1


class EncodedPulls:
    """c as workers pull it, encoded once for each clock, in vectors that replies read while c moves on.

    Args:
        encoding: of the pulls.
        like: c (n,).
        limit: vectors that replies under way may read at a time.
        wire: as of the center.
    """

    def __init__(self, encoding: Encoding, like: Array, limit: int, wire: str) -> None:
        self._encoding = encoding
        self._buffers = Buffers(like, limit, wire, encoding.nbytes(like.size, like.dtype), "u1")
        self.current: Buffer | None = None  # what was encoded last
        self._clock = -1  # of what it holds
        encoding.prepare(like)

    def room(self, lent: int) -> bool:
        """Whether c can be encoded at another clock; else some replies must be sent first. `lent`: as of `Buffers`."""
        return self.current is None or not self.current.readers or self._buffers.available(lent)

    def at(self, c: Array, clock: int, lent: int) -> Buffer:
        """`c` at `clock`, encoded; there is `room`."""
        if clock != self._clock:
            if self.current is None or self.current.readers:
                self.current = self._buffers.acquire(lent)
            assert self.current is not None
            encode_pull(self._encoding, c, self.current.x, clock)
            self._clock = clock
        assert self.current is not None
        return self.current

    def forget(self) -> None:
        """c may have changed without its clock."""
        self._clock = -1


class Vectors:
    """The vectors of a center: c, message buffers, c as it is pulled.

    `lent`, below: message buffers in use by silent workers; the others get as many extra, until these are returned.
    If they read c itself, one extra may be allocated for its copy, but for nothing else: without it nobody could be
    served.

    Args:
        c: (n,) the center variable.
        limit: message buffers.
        wire: as of the center.
        pulls: the encoding of c for those who ask for it.
    """

    def __init__(self, c: Array, limit: int, wire: str, pulls: Encoding) -> None:
        self.messages = Buffers(c, limit, wire)
        self.center = Buffer(c, make_wire(c, wire), self.messages)
        self.pulls = EncodedPulls(pulls, c, limit, wire)

    def may_serve(self, commit: Commit, lent: int, lent_with_center: int) -> bool:
        """Whether there is room to serve this message. c is safe to change then: if a reply reads it, a copy of it."""
        if commit.requests & ENCODED and not self.pulls.room(lent):
            return False
        if commit.nbytes and self.center.readers:
            copy = self.messages.acquire(lent_with_center)
            if copy is None:
                return False
            copy.x[...] = self.center.x
            self.center = copy  # the old one becomes a message buffer when its last reply is sent
        return True

    def pulled(self, commit: Commit, clock: int, lent: int) -> Buffer:
        """What the reply to this message sends of c."""
        return self.pulls.at(self.center.x, clock, lent) if commit.requests & ENCODED else self.center

    def done_reading(self, buffer: Buffer, lent: int) -> None:
        """A reply that has read `buffer` is sent."""
        buffer.readers -= 1
        if not buffer.readers and buffer not in (self.center, self.pulls.current):
            buffer.pool.release(buffer, lent)


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
    SPARE = 7  # it waits to take a worker's place; it is answered when it does, or when all have left
    LOST = 8  # its worker is dead


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

    def receive(self, ticks: Ticks) -> Stream:
        """Where the delta of the current message is received: in its buffer; without one it is discarded."""
        post, nbytes, buffer = partial(self.comm.Irecv, source=self.rank, tag=DELTA), self.commit.nbytes, self.buffer
        if buffer is None:
            self.delta = Stream(post, discarded(nbytes), nbytes, ticks, in_flight=1, limit=0)
        else:
            buffer.delta = delta = buffer.x if not self.commit.encoding else buffer.x.view("u1")[:nbytes]
            pieces, arrived = cut(buffer.wire.incoming(delta), PIECE), partial(buffer.wire.arrived, delta)
            self.delta = Stream(post, pieces, delta.size, ticks, done=arrived, limit=0)
        return self.delta

    def send(self, source: Buffer, stop: int, ticks: Ticks) -> None:
        """Send c in `source`, up to element `stop`."""
        c = source.x
        if self.out is None:
            post = partial(self.comm.Isend, dest=self.rank, tag=CENTER_VARIABLE)
            self.out = Stream(post, source.outgoing(), c.size, ticks, limit=0)
        self.out.extend(stop if stop == c.size else stop - stop % (PIECE // c.dtype.itemsize))

    def reply(self, reply: Reply, source: Buffer, ticks: Ticks) -> None:
        """Answer the current message, with c in `source` if requested."""
        header, pulls = reply.encode(), self.commit.requests & PULL
        if pulls and source.x.nbytes <= INLINE:
            header = to_host(source.x).tobytes() + header
        elif pulls:
            self.send(source, source.x.size, ticks)
        request = self.comm.Isend(header, self.rank, REPLY)
        self.answer, self.out = Answer(header, request, self.out, source), None
        source.readers += self.answer.stream is not None

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

    def admit(self, comm: MPI.Comm) -> Peer:
        """One more, alone at the other side of `comm`."""
        peer = Peer(len(self.all), comm, 0)
        self.all.append(peer)
        self._by_state[peer.state][peer] = None
        return peer

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

    @property
    def unanswered(self) -> set[int]:
        """Workers to which a reply is on its way; not spares that were not called."""
        return {peer.index for peer in self.at(State.ANSWERING) if peer.answer and not peer.commit.requests & SPARE}


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
        self._sizes = sizes(like.size, like.dtype)
        self._buffer, self._status = bytearray(COMMIT_BYTES + INLINE), MPI.Status()

    def poll(self) -> tuple[Peer, Commit] | None:
        """Return the next header that has arrived, with MISFIT if need be, and with the payload if that came inline."""
        message = self._comm.Improbe(MPI.ANY_SOURCE, HEADER, self._status)
        if message is None:
            return None
        count = self._status.Get_count()
        if count > len(self._buffer):  # a sum of many commits
            self._buffer = bytearray(count)
        message.Recv(self._buffer)  # so small that it came with its envelope
        peer = self._peers[self._status.Get_source()]
        commit, inline = Commit.split(bytes(self._buffer[:count]))
        commit = commit.received_from(peer.index, self._sizes)
        if inline and len(inline) != commit.nbytes:
            commit = commit._replace(flags=commit.flags | MISFIT)
        if inline:
            dtype = np.dtype(np.uint8) if commit.flags & MISFIT or commit.encoding else self._like.dtype
            commit = commit._replace(payload=bring(np.frombuffer(inline, dtype), self._like))
        return peer, commit

    def dead(self) -> list[Peer]:
        """Who has died, after `poll` has failed; acknowledged, so that `poll` works again for the others (ULFM)."""
        ranks = failed_ranks(self._comm)
        self._comm.Ack_failed(len(ranks))
        return [self._peers[rank] for rank in ranks]
