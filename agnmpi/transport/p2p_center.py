"""The center's two-sided end: hears workers, receives deltas into a few buffers, replies behind the apply."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..core.backoff import wait_until
from ..core.ends import Apply, CenterEnd
from ..core.messages import LEAVE, MISFIT, PULL, Commit, Reply
from .buffers import Buffer, Buffers
from .chunks import ALL, PIECE, Stream, Ticks
from .peers import CENTER_VARIABLE, DELTA, REPLY, Answer, Listener, Peer, Peers, State, gone
from .staging import cut, make_wire

CENTER = 0  # rank
_PAUSE = 2e-4  # seconds without a look at the messages while a commit is applied, at least
_RETRY = 0.1  # seconds after which a parked request is looked at again


class P2PCenter(CenterEnd):
    """The center's end: rank 0 of `comm`.

    Deltas are received in the order of their headers, and messages served in the order in which they became whole: one
    that comes slowly holds up none.

    Args:
        comm: Communicator of the center (rank 0) and its workers, of our own.
        c: (n,) center variable, kept and changed in place.
        message_buffers: Vectors beside c for deltas coming in and replies going out.
        wire: "staged" or "direct", where c lies on a device.

    Attributes:
        lost: Workers that have died, with `on_loss` alone; else the error is raised.
        silent: Workers that nobody waits for, until they are heard of again.
        on_loss: Called with each worker that has died, between two messages.
        on_whole: Called with each message when its last byte is here, maybe amid an apply.
        hold: While this is true of a commit with payload, the receive of its delta does not begin.
        in_hand: Deltas whose receive has begun, and that are not applied yet.
    """

    in_hand = 0

    def __init__(self, comm: MPI.Comm, c: Array, message_buffers: int = 4, wire: str = "staged") -> None:
        if message_buffers < 1:
            raise ValueError(f"the center needs at least one message buffer, not {message_buffers}")
        self._center = Buffer(c, make_wire(c, wire))
        self._buffers = Buffers(c, message_buffers, wire)
        self._peers = Peers([Peer(rank - 1, comm, rank) for rank in range(1, comm.size)])
        self._listener = Listener(comm, self._peers.all)
        self._waited_for = set[int]()  # workers that have not left, and are neither lost nor silent
        self._farewell: Reply | None = None  # what those that have left are told in the end
        self._left = 0  # workers that have left this session
        self._dying: deque[Peer] = deque()  # lost, but not reported yet
        self._serving: Peer | None = None  # whose message is being applied
        self._ticks = Ticks()
        self._look_at = self._retry_at = 0.0  # times of the next look at the messages, and at what is parked
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.on_loss: Callable[[int], None] | None = None
        self.on_whole: Callable[[Commit], None] | None = None
        self.hold: Callable[[Commit], bool] | None = None

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._center.x

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return len(self._waited_for)

    @property
    def deserted(self) -> bool:
        """Whether all workers were lost, and none has left."""
        return not self.live and not self._left

    @property
    def progress(self) -> int:
        """Changes whenever a header, or a piece of a vector, has come or gone."""
        return self._ticks.count

    @property
    def buffers_made(self) -> int:
        """Vectors that there are beside c."""
        return self._buffers.made

    def open(self) -> None:
        """Begin a session: listen to all workers."""
        self._left = 0
        self._waited_for = {peer.index for peer in self._peers.all if peer.state is not State.LOST} - self.silent
        for peer in self._peers.at(State.LEFT):
            self._listen_to(peer)

    # One message, from its header to its reply.

    def serve_one(self, apply: Apply) -> bool:
        """Serve the first message that is whole, and make progress on all others; not amid an apply.

        A request without payload for which `apply` gives None is kept, and `apply` asked again after each later
        message; it is answered when that gives a reply.
        """
        assert self._serving is None, "serve_one was called amid an apply"
        if self._peers.first(State.READY) is None or time.perf_counter() >= self._look_at:
            self._look()
        self._report_lost()
        peer = self._peers.first(State.READY)
        if peer is None:
            return time.perf_counter() >= self._retry_at and self._serve_parked(apply)
        if peer.buffer is not None and not self._own_center():
            self._look_at = 0.0  # for the reply that reads c
            return False
        self._serve(peer, apply)
        self._serve_parked(apply)
        self._report_lost()  # those that died while they were answered
        return True

    def _serve(self, peer: Peer, apply: Apply) -> None:
        commit, buffer = peer.commit, peer.buffer
        peer.buffer, self._serving = None, peer
        self._peers.move(peer, State.ANSWERING)
        reply = apply(commit if buffer is None else commit._replace(payload=buffer.x), self.c)
        self._serving = None
        self.in_hand -= commit.nbytes > 0
        if buffer is not None:
            self._buffers.give_back(buffer, self._lent())
        if peer.state is State.LOST:
            return
        if reply is None:
            self._peers.move(peer, State.PARKED)
        elif commit.requests & LEAVE:
            self._peers.move(peer, State.LEFT)
            self._waited_for.discard(peer.index)
            self._left, self._farewell = self._left + 1, reply
            self._part()
        else:
            self._answer(peer, reply)

    def _serve_parked(self, apply: Apply) -> bool:
        """Answer those that ask for work, as long as there is some; whether one was answered."""
        answered = False
        while (peer := self._peers.first(State.PARKED)) and (reply := apply(peer.commit, self.c)) is not None:
            self._peers.move(peer, State.ANSWERING)
            self._answer(peer, reply)
            answered = True
        # Work also comes free without a message (a worker is lost), and all may be asked to stop.
        self._retry_at = time.perf_counter() + _RETRY
        return answered

    def _answer(self, peer: Peer, reply: Reply) -> None:
        """Begin a reply, with c if that was asked for."""

        def begin() -> bool:
            if peer.commit.requests & PULL:
                self._send(peer, self.c.size)
            header = reply.encode()
            request = peer.comm.Isend(header, peer.rank, REPLY)
            peer.answer, peer.out = Answer(header, request, peer.out, self._center), None
            self._center.readers += peer.answer.stream is not None
            return True

        if self._try(peer, begin):
            self._push(peer)

    def _send(self, peer: Peer, stop: int) -> bool:
        """Send c to a worker, up to element `stop`."""
        if peer.out is None:
            post = partial(peer.comm.Isend, dest=peer.rank, tag=CENTER_VARIABLE)
            peer.out = Stream(post, self._center.outgoing(), self._ticks, limit=0)
        piece = PIECE // self.c.dtype.itemsize
        peer.out.extend(ALL if stop == self.c.size else stop - stop % piece)
        return True

    def _push(self, peer: Peer) -> None:
        """Make progress on a reply; once it is out, its worker may go on."""
        if peer.answer is None or not self._try(peer, peer.answer.test):
            return
        answer, peer.answer = peer.answer, None
        self._done_reading(answer)
        if peer.commit.requests & LEAVE:
            self._peers.move(peer, State.LEFT)
        else:
            self._listen_to(peer)

    def _done_reading(self, answer: Answer) -> None:
        buffer = answer.buffer
        buffer.readers -= answer.stream is not None
        if answer.stream and not buffer.readers and buffer is not self._center:
            self._buffers.give_back(buffer, self._lent())

    def _own_center(self) -> bool:
        """Make c safe to change: if a reply still reads it, go on with a copy; False if no buffer is free."""
        if self._center.readers:
            copy = self._buffers.take(len(self._held_by_silent()))
            if copy is None:
                return False
            copy.x[...] = self._center.x
            self._center = copy  # the old one becomes a message buffer when its last reply is out
        return True

    def _held_by_silent(self) -> set[Buffer]:
        return set[Buffer]().union(*(self._peers.all[worker].held for worker in self.silent))

    def _lent(self) -> int:
        """Message buffers that wait for silent workers: the others get as many more, until these are back.

        If it is c that they read, one more may be made for the copy of it, but for nothing else: without one nobody
        could be served.
        """
        return len(self._held_by_silent() - {self._center})

    # A look at the messages: headers come in, deltas arrive, replies go out. Nothing is applied, reported or changed in
    # c: so it may happen amid an apply.

    def move_on(self, stop: int) -> None:
        """While a commit is applied, and c is done up to element `stop`: send that, and move on other messages.

        Whose commit it is may turn out to be dead here, as any other worker. It is reported by `serve_one`, later.
        """
        peer = self._serving
        if peer and peer.state is not State.LOST and peer.commit.requests & PULL:
            self._try(peer, partial(self._send, peer, stop))
        if self.live > 1 and time.perf_counter() >= self._look_at:
            self._look()

    def _look(self) -> None:
        begin = time.perf_counter()
        self._listen()
        self._receive()
        self._flush()
        end = time.perf_counter()
        self._look_at = end + max(_PAUSE, 10 * (end - begin))

    def _listen(self) -> None:
        """Take in the headers that have come."""
        try:
            while heard := self._listener.hear():
                self._take_in(*heard)
        except MPI.Exception as error:
            if self.on_loss is None or not gone(error):
                raise
            dead = self._listener.dead()
            if not dead:  # revoked
                raise
            for peer in dead:
                self._bury(peer)

    def _take_in(self, peer: Peer, header: Commit) -> None:
        self._ticks.count += 1
        if peer.state is State.LOST:
            return
        self._heard_of(peer)
        peer.inbox.append(header.taken_from(peer.index, self.c.nbytes))
        if peer.state is State.LISTENING:
            self._listen_to(peer)

    def _listen_to(self, peer: Peer) -> None:
        """Go on with the next message of a worker, if it is there; its messages are served in order."""
        self._peers.move(peer, State.LISTENING)
        if not peer.inbox:
            return
        peer.commit = peer.inbox.popleft()
        if peer.commit.nbytes:
            self._peers.move(peer, State.QUEUED)
        else:
            self._whole(peer)

    def _whole(self, peer: Peer) -> None:
        self._heard_of(peer)
        self._peers.move(peer, State.READY)
        if self.on_whole is not None:
            self.on_whole(peer.commit)

    def _receive(self) -> None:
        """Give free buffers to waiting deltas, and move on those that have arrived."""
        # One delta after the other, as long as it comes: while the next arrives, the reply to this one leaves, and both
        # directions of the link stay busy. Together they would all arrive at the same time, and nothing leave before.
        busy = any(peer.delta and peer.delta.busy for peer in self._peers.at(State.RECEIVING))
        while not busy and (peer := self._next_delta()) and self._start(peer):
            busy = peer.delta is not None and peer.delta.busy
        for peer in self._peers.at(State.RECEIVING):
            if peer.delta and self._try(peer, peer.delta.test):
                if peer.buffer is not None:
                    peer.buffer.wire.settle(peer.buffer.x)
                self._whole(peer)

    def _next_delta(self) -> Peer | None:
        """The first that waits for a buffer, and is not held."""
        if self.hold is None:
            return self._peers.first(State.QUEUED)
        return next((peer for peer in self._peers.at(State.QUEUED) if not self.hold(peer.commit)), None)

    def _start(self, peer: Peer) -> bool:
        """Begin to receive a delta; False if no buffer is free. What does not fit is received to no use."""
        post = partial(peer.comm.Irecv, source=peer.rank, tag=DELTA)
        if peer.commit.flags & MISFIT:
            peer.delta = Stream(post, _scratch(peer.commit.nbytes), self._ticks, in_flight=1, limit=0)
        else:
            buffer = peer.buffer = self._buffers.take(self._lent())
            if buffer is None:
                return False
            pieces = cut(buffer.wire.incoming(buffer.x), PIECE)
            arrived = partial(buffer.wire.arrived, buffer.x)
            peer.delta = Stream(post, pieces, self._ticks, done=arrived, limit=0)
        self._peers.move(peer, State.RECEIVING)
        self.in_hand += 1
        # It is the peer's by now: if the first receives are posted and the next fails, their memory is kept with it.
        self._try(peer, partial(peer.delta.extend, ALL))
        return True

    def _flush(self) -> bool:
        """Push the replies; whether all are out, but for those to silent workers."""
        for peer in self._peers.at(State.ANSWERING):
            self._push(peer)
        return all(peer.index in self.silent for peer in self._peers.at(State.ANSWERING) if peer.answer)

    # Workers that leave, fall silent, come back or die.

    def _part(self) -> None:
        """Answer the farewells if no worker is left."""
        if self.live or self._farewell is None:
            return
        farewell, self._farewell = self._farewell, None
        for peer in self._peers.at(State.LEFT):
            self._peers.move(peer, State.ANSWERING)
            self._answer(peer, farewell)
        wait_until(self._flush)

    def _heard_of(self, peer: Peer) -> None:
        if peer.index in self.silent:
            self.silent.discard(peer.index)
            self._waited_for.add(peer.index)

    def stop_waiting_for(self, worker: int) -> None:
        """Wait for this silent worker no longer; it is one of the others again when it is heard of."""
        if worker not in self._waited_for:
            return
        # Its messages stay where they are; the others get as many buffers as these hold.
        self._waited_for.discard(worker)
        self.silent.add(worker)
        self._part()
        self._report_lost()

    def _try(self, peer: Peer, call: Callable[[], bool | None]) -> bool:
        """Call what speaks with a worker; if that is dead, forget it, and go on without."""
        try:
            return call() is not False
        except MPI.Exception as error:
            if self.on_loss is None or not gone(error):
                raise
            self._bury(peer)
            return False

    def _bury(self, peer: Peer) -> None:
        """Forget the messages of a dead worker; it is reported between two messages, not amid an apply."""
        if peer.state is State.LOST:
            return
        if peer.state in (State.RECEIVING, State.READY):
            self.in_hand -= peer.commit.nbytes > 0
        if peer.buffer is not None and peer.state is State.READY:
            self._buffers.give_back(peer.buffer, self._lent())
        elif peer.buffer is not None:
            self._buffers.give_up()
        if peer.answer is not None:
            self._done_reading(peer.answer)
        self._peers.move(peer, State.LOST)
        self._dying.append(peer)

    def _report_lost(self) -> None:
        while self._dying:
            worker = self._dying.popleft().index
            self.lost.add(worker)
            self._waited_for.discard(worker)
            self.silent.discard(worker)
            self._retry_at = 0.0  # what it held is free
            if self.on_loss is not None:
                self.on_loss(worker)
            self._part()

    def close(self) -> None:
        """Nothing to free: no receive is posted once all workers have left."""


def _scratch(nbytes: int) -> Iterator[Array]:
    """Room for what is received to no use, again and again the same."""
    scratch = np.empty(min(PIECE, nbytes), np.uint8)
    return (scratch[: min(PIECE, nbytes - at)] for at in range(0, nbytes, PIECE))
