"""Two-sided ends: Isend/Irecv, one round trip for an exchange, on any MPI.

A worker sends a header and, right behind it, its delta; then it posts the receives of the reply. The
center keeps one small header receive posted for each worker, and receives deltas into a few slots, whatever
the number of workers. It applies a delta when its last byte is there, and replies from c in place, block by
block behind the apply; while that reply is on its way, the next apply works on a copy (copy on write, in a slot).

Each request is tested by itself: Waitany's order starves high ranks, and Waitall hides which rank failed.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, empty_like
from ..core.backoff import wait_until
from ..core.ends import Apply, CenterEnd, Handle, InTurn, WorkerEnd
from ..core.messages import COMMIT_BYTES, LEAVE, MISFIT, PULL, Commit, Reply, reply_bytes
from .chunks import ALL, PIECE, Stream, Ticks
from .staging import Direct, Wire, cut, make_wire

CENTER = 0  # rank
_HEADER, _DELTA, _REPLY, _CENTER_VARIABLE = range(1, 5)  # tags, on a communicator of our own


class _Exchange:
    """A worker's exchange under way."""

    def __init__(self, comm: MPI.Comm, wire: Wire, commit: Commit, out: Array | None) -> None:
        self._wire, self._out = wire, out
        self._done: Reply | None = None
        self._ticks = Ticks()
        self._streams: list[Stream] = []
        payload = commit.payload
        requests, nbytes = commit.requests | (PULL if out is not None else 0), 0 if payload is None else payload.nbytes
        self._requests = [comm.Isend(commit._replace(requests=requests, nbytes=nbytes).encode(), CENTER, _HEADER)]
        if payload is not None:
            pieces = (piece for chunk in wire.outgoing(payload) for piece in cut(chunk, PIECE))
            self._streams.append(Stream(lambda x: comm.Isend(x, CENTER, _DELTA), pieces, self._ticks, ALL))
        # The receives come after the sends, while these are under way.
        self._header = bytearray(reply_bytes(comm.size - 1, True))
        self._requests.append(comm.Irecv(self._header, CENTER, _REPLY))
        if out is not None:
            self._streams.append(
                Stream(
                    lambda x: comm.Irecv(x, CENTER, _CENTER_VARIABLE),
                    cut(wire.incoming(out), PIECE),
                    self._ticks,
                    ALL,
                    lambda part: wire.arrived(out, part),
                )
            )

    def test(self) -> bool:
        if self._done is None:
            self._requests = [request for request in self._requests if not request.Test()]
            self._streams = [stream for stream in self._streams if not stream.test()]
            if not self._streams and not self._requests:
                if self._out is not None:
                    self._wire.settle(self._out)
                self._done = Reply.decode(self._header)
        return self._done is not None

    def _progress(self) -> int:
        return self._ticks.count - len(self._requests)

    def wait(self) -> Reply:
        wait_until(self.test, self._progress)
        assert self._done is not None
        return self._done


class P2PWorker(WorkerEnd):
    """A worker's end: every rank but 0 of `comm`."""

    def __init__(self, comm: MPI.Comm, wire: Wire | None = None) -> None:
        self._comm, self._worker, self.wire = comm, comm.rank - 1, wire or Direct()

    def exchange(self, commit: Commit, out: Array | None) -> _Exchange:
        """Send `commit` and post the receives of its reply."""
        return _Exchange(self._comm, self.wire, commit, out)

    def pull(self, out: Array) -> _Exchange:
        """Ask for the center."""
        return self.exchange(Commit(self._worker), out)

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """Say farewell, right behind the last commit; the reply comes when all have left."""
        last = [] if commit is None else [self.exchange(commit, None)]
        return InTurn(*last, self.exchange(Commit(self._worker, requests=LEAVE), out))


def gone(error: MPI.Exception) -> bool:
    """Whether `error` tells of a dead peer (ULFM)."""
    found: int = error.Get_error_class()
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    return found in [getattr(MPI, name) for name in names if hasattr(MPI, name)]


class _Buffer:
    """A vector at the center, the wire that carries it, and the number of replies under way that read it."""

    def __init__(self, x: Array, wire: Wire) -> None:
        self.x, self.wire, self.readers = x, wire, 0
        self._copied: list[Array] = []  # what the wire gave out for the x of now

    def outgoing(self) -> Iterator[Array]:
        """Pieces to send; x keeps still while they are read."""
        if self.readers and self._copied:
            chunks = self._copied
        else:
            self._copied = chunks = list(self.wire.outgoing(self.x))
        return (piece for chunk in chunks for piece in cut(chunk, PIECE))


class _Answer(NamedTuple):
    """A reply under way."""

    worker: int
    header: bytes
    request: MPI.Request
    stream: Stream | None
    buffer: _Buffer

    def test(self) -> bool:
        return self.request.Test() and (self.stream is None or self.stream.test())


class P2PCenter(CenterEnd):
    """The center's end: rank 0 of `comm`.

    `c`: (n,) center variable, kept; `slots`: vectors beside it for deltas coming in and replies going out; `wire`:
    "staged" or "direct", where c lies on a device. Headers are taken in round robin, slots given in the order of
    headers, and messages served in the order in which they became whole: one that comes slowly holds up none.
    """

    def __init__(self, comm: MPI.Comm, c: Array, slots: int = 4, wire: str = "staged") -> None:
        if slots < 1:
            raise ValueError(f"the center needs at least one slot, not {slots}")
        self._comm, self._workers, self._wire = comm, comm.size - 1, wire
        self._center = _Buffer(c, make_wire(c, wire))
        self._slots_left, self._free = slots, list[_Buffer]()
        self._headers = [bytearray(COMMIT_BYTES) for _ in range(self._workers)]
        self._posted: dict[int, MPI.Request] = {}  # header receives, by worker
        self._turn = 0  # where the round over workers begins
        self._queue: deque[Commit] = deque()  # deltas that wait for a slot, by arrival
        self._receiving: list[tuple[Commit, _Buffer | None, Stream]] = []
        self._ready: deque[tuple[Commit, _Buffer | None]] = deque()
        self._replies: list[_Answer] = []
        self._applied: Commit | None = None  # while it is, if it requests c
        self._out: Stream | None = None  # c on its way to the worker of that one, block by block
        self._left: list[Commit] = []
        self.lost: set[int] = set()  # workers that have died, with `on_loss` alone; else the error is raised
        self.on_loss: Callable[[int], None] | None = None  # told of each, after its messages are forgotten
        self._dying: list[int] = []  # lost, but not reported yet
        self.silent: set[int] = set()  # workers that nobody waits for, until they are heard of again
        self._farewell: Reply | None = None
        self._buried: list[object] = []  # requests of the dead, and what MPI may still touch for them
        self._ticks = Ticks()
        self._moved = 0.0  # time of the last look at the messages

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._center.x

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return self._workers - len({commit.worker for commit in self._left} | self.lost | self.silent)

    @property
    def deserted(self) -> bool:
        """Whether all workers were lost, and none has left."""
        return not self.live and not self._left

    @property
    def progress(self) -> int:
        """Changes whenever a header, or a piece of a vector, has come or gone."""
        return self._ticks.count

    def open(self) -> None:
        """Begin a session: listen to all workers."""
        self._left.clear()
        for worker in range(self._workers):
            self._post(worker)

    def serve_one(self, apply: Apply) -> bool:
        """Make progress on all messages and serve the first that is whole."""
        self._move()
        self._report_lost()
        if not self._ready:
            return False
        commit, slot = self._ready[0]
        if slot is not None and not self._own_center():
            return False
        self._ready.popleft()
        self._applied = commit if commit.requests & (PULL | LEAVE) == PULL else None
        reply = apply(commit if slot is None else commit._replace(payload=slot.x), self.c)
        self._applied = None
        if slot is not None:
            self._free.append(slot)
        if not commit.requests & LEAVE:
            self._answer(commit, reply)
            self._post(commit.worker)
            return True
        self._left.append(commit)
        self._farewell = reply
        self._part()
        self._report_lost()  # those that died while they were answered
        return True

    def _part(self) -> None:
        """Answer the farewells if no worker is left."""
        if self.live or self._farewell is None:
            return
        farewell, self._farewell = self._farewell, None
        for leaver in self._left:
            self._answer(leaver, farewell)
        wait_until(self._flush)

    def _try(self, worker: int, call: Callable[[], bool]) -> bool:
        """Call what speaks with `worker`; if that is dead, forget it, and go on without."""
        try:
            return call()
        except MPI.Exception as error:
            if self.on_loss is None or not gone(error):
                raise
            self._bury(worker)
            return False

    def _bury(self, worker: int) -> None:
        """Forget the messages of a dead worker; it is reported between two messages, not amid an apply."""
        if self._dead(worker):
            return
        self._dying.append(worker)
        # The memory of what is under way stays as long as we live: MPI may still write there.
        self._buried.append(self._posted.pop(worker, None))
        self._queue = deque(commit for commit in self._queue if commit.worker != worker)
        for item in [item for item in self._receiving if item[0].worker == worker]:
            self._receiving.remove(item)
            self._buried.append(item)
            self._slots_left += item[1] is not None
        for reply in [reply for reply in self._replies if reply.worker == worker]:
            self._replies.remove(reply)
            self._buried.append(reply)
            self._done_reading(reply)
        for whole in [whole for whole in self._ready if whole[0].worker == worker]:
            self._ready.remove(whole)
            if whole[1] is not None:
                self._free.append(whole[1])

    def _report_lost(self) -> None:
        while self._dying:
            worker = self._dying.pop()
            self.lost.add(worker)
            if self.on_loss is not None:
                self.on_loss(worker)
            self._part()

    def stop_waiting_for(self, worker: int) -> None:
        """Wait for this silent worker no longer; it is one of the others again when it is heard of."""
        self.silent.add(worker)
        # Its messages stay where they are; the others get as many slots as these hold.
        held = [commit for commit, _, _ in self._receiving] + list(self._queue)
        self._slots_left += sum(commit.worker == worker for commit in held)
        self._slots_left += sum(answer.worker == worker and answer.stream is not None for answer in self._replies)
        self._part()
        self._report_lost()

    def move_on(self, stop: int) -> None:
        """While a commit is applied, and c is done up to `stop`: send that, and move on other messages."""
        if self._applied and not self._try(self._applied.worker, partial(self._send, self._applied.worker, stop)):
            self._applied = None
        if self.live > 1 and time.perf_counter() - self._moved > 2e-4:
            self._move()

    def _move(self) -> None:
        self._listen()
        self._receive()
        self._flush()
        self._moved = time.perf_counter()

    def _listen(self) -> None:
        """Take in the headers that have come, round robin."""
        for i in range(self._workers):
            worker = (self._turn + i) % self._workers
            request = self._posted.get(worker)
            if request is not None and self._try(worker, request.Test):
                self._ticks.count += 1
                self.silent.discard(worker)
                commit = Commit.decode(self._headers[worker]).taken_from(worker, self.c.nbytes)
                if commit.nbytes and commit.flags & MISFIT:
                    self._swallow(commit)
                elif commit.nbytes:
                    self._queue.append(commit)
                else:
                    self._ready.append((commit, None))
                # The next header is received when this message has been served: a worker's are served in order.
                del self._posted[worker]
        self._turn += 1

    def _post(self, worker: int) -> None:
        def post() -> bool:
            self._posted[worker] = self._comm.Irecv(self._headers[worker], worker + 1, _HEADER)
            return True

        if not self._dead(worker):
            self._try(worker, post)

    def _dead(self, worker: int) -> bool:
        return worker in self.lost or worker in self._dying

    def _receive(self) -> None:
        """Give free slots to waiting deltas, and move on those that have arrived."""
        # One delta after the other, as long as it comes: while the next arrives, the reply to this one leaves, and both
        # directions of the link stay busy. Together they would all arrive at the same time, and nothing leave before.
        while self._queue and not any(stream.busy for _, _, stream in self._receiving) and (slot := self._slot()):
            commit = self._queue.popleft()
            self._try(commit.worker, partial(self._start, commit, slot))
        for item in self._receiving[:]:
            commit, slot, stream = item
            if self._try(commit.worker, stream.test):
                if slot is not None:
                    slot.wire.settle(slot.x)
                self._receiving.remove(item)
                self._ready.append((commit, slot))

    def _start(self, commit: Commit, slot: _Buffer) -> bool:
        """Post the receives of a delta."""
        stream = Stream(
            lambda x: self._comm.Irecv(x, commit.worker + 1, _DELTA),
            cut(slot.wire.incoming(slot.x), PIECE),
            self._ticks,
            done=lambda part: slot.wire.arrived(slot.x, part),
        )
        self._receiving.append((commit, slot, stream))
        return True

    def _swallow(self, commit: Commit) -> None:
        """Receive what follows a header that does not fit, to no use; the commit is refused then."""
        scratch = np.empty(min(PIECE, commit.nbytes), np.uint8)
        pieces = (scratch[: min(PIECE, commit.nbytes - at)] for at in range(0, commit.nbytes, PIECE))
        post = partial(self._comm.Irecv, source=commit.worker + 1, tag=_DELTA)
        self._receiving.append((commit, None, Stream(post, pieces, self._ticks, in_flight=1)))

    def _slot(self) -> _Buffer | None:
        if self._free:
            return self._free.pop()
        if not self._slots_left:
            return None
        self._slots_left -= 1
        return _Buffer(empty_like(self.c), make_wire(self.c, self._wire))

    def _own_center(self) -> bool:
        """Make c safe to change: if a reply still reads it, go on with a copy; False if no slot is free."""
        if self._center.readers:
            copy = self._slot()
            if copy is None:
                return False
            copy.x[...] = self._center.x
            self._center = copy  # the old one becomes a slot when its last reply is out
        return True

    def _send(self, worker: int, stop: int) -> bool:
        """Send c to a worker, up to element `stop`."""
        if self._out is None:
            post = partial(self._comm.Isend, dest=worker + 1, tag=_CENTER_VARIABLE)
            self._out = Stream(post, self._center.outgoing(), self._ticks, limit=0)
        piece = PIECE // self.c.dtype.itemsize
        self._out.extend(ALL if stop == self.c.size else stop - stop % piece)
        return True

    def _answer(self, commit: Commit, reply: Reply) -> None:
        worker, buffer = commit.worker, self._center

        def send() -> bool:
            if commit.requests & PULL:
                self._send(worker, buffer.x.size)
            header = reply.encode()
            request = self._comm.Isend(header, worker + 1, _REPLY)
            buffer.readers += self._out is not None
            self._replies.append(_Answer(worker, header, request, self._out, buffer))
            self._out = None
            return True

        if self._dead(worker) or not self._try(worker, send):
            self._buried.append(self._out)
            self._out = None

    def _flush(self) -> bool:
        """Push the replies; whether all are out, but for those to dropped workers."""
        for answer in self._replies[:]:
            if self._try(answer.worker, answer.test) and answer in self._replies:
                self._replies.remove(answer)
                self._done_reading(answer)
        return all(answer.worker in self.silent for answer in self._replies)

    def _done_reading(self, answer: "_Answer") -> None:
        buffer = answer.buffer
        if answer.stream:
            buffer.readers -= 1
            if not buffer.readers and buffer is not self._center:
                self._free.append(buffer)
