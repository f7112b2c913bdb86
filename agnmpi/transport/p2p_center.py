"""The center's two-sided end: polls for headers, receives deltas into a few buffers, replies during the apply."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from mpi4py import MPI

from ..arrays.backend import Array
from ..arrays.encodings import get
from ..core.backoff import StandsStill, wait_until
from ..core.ends import Apply, CenterEnd
from ..core.messages import ENCODED, LEAVE, MISFIT, PULL, SPARE, UNCALLED, Commit, Reply
from .chunks import ALL, INLINE, Ticks
from .peers import Answer, Buffer, Listener, Peer, Peers, State, Vectors, peer_failed

CENTER = 0  # rank
_PAUSE = 2e-4  # least time between polls while a commit is applied, in seconds
_RETRY = 0.1  # seconds after which a parked request is tried again


class P2PCenter(CenterEnd):
    """The center's end: rank 0 of `comm`.

    Deltas are received in the order of their headers, and messages served in the order in which they are complete:
    a slow one delays no other.

    Args:
        comm: Communicator of the center (rank 0) and its workers, of our own.
        c: (n,) center variable, changed in place.
        message_buffers: Vectors beside c for incoming deltas and outgoing replies.
        wire: "staged" or "direct", where c lies on a device.
        pull_encoding: Of c in the replies to those who ask for it.
        numbers: Of the workers, where they are not 0, 1, …
        kept: Workers that spares keep up, as long as there are any.
        trains: Whether rank 0 is a worker, too, the last: by messages to itself, so neither may wait for the other.

    Attributes:
        lost: Workers that have died, with `on_loss` alone; else the error is raised.
        silent: Workers that nobody waits for, until they send something.
        dispensable: As of `CenterEnd`.
        on_loss: Called with each worker that has died, between two messages.
        on_join: Called with each spare that takes its place.
        on_whole: Called with each message when it is complete, possibly during an apply.
        hold: While this is true of a commit with payload, the receive of its delta does not begin.
        in_flight_deltas: Deltas whose receive has begun and that are not applied yet.
    """

    in_flight_deltas = 0
    longest_sleep = 5e-3  # a message wakes it with one look; each costs tens of µs of the core

    def __init__(
        self, comm: MPI.Comm, c: Array, message_buffers: int = 4, wire: str = "staged", pull_encoding: str = "float32",
        numbers: Sequence[int] = (), trains: bool = False, kept: int = 0,
    ) -> None:  # fmt: skip
        if message_buffers < 1:
            raise ValueError(f"the center needs at least one message buffer, not {message_buffers}")
        self._vectors = Vectors(c, message_buffers, wire, get(pull_encoding))
        numbers = numbers or range(comm.size - (not trains))
        ranks = [*range(1, comm.size), *([CENTER] if trains else [])]
        self._peers = Peers([Peer(number, comm, rank) for number, rank in zip(numbers, ranks)])
        self._listeners = [Listener(comm, self._peers.all, c)]  # then, of each worker that was taken in
        self._expected = set[int]()  # workers that have not left, and are neither lost nor silent
        self._leave_reply: Reply | None = None  # the reply to workers that have left
        self._left = 0  # workers that have left this session
        self._kept = kept
        self.dispensable: set[int] = set(range(kept or len(ranks), len(ranks)))
        self._stands_still = StandsStill()
        self._dying: deque[Peer] = deque()  # lost, but not reported yet
        self._serving: Peer | None = None  # whose message is being applied
        self._ticks = Ticks()
        self._poll_at = self._retry_at = 0.0  # times of the next poll, and of the next try of parked requests
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.on_whole: Callable[[Commit], None] | None = None

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._vectors.center.x

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return len(self._expected)

    @property
    def deserted(self) -> bool:
        """Whether all workers were lost, and none has left."""
        return not self.live and not self._left and not self._peers.any(State.SPARE)

    @property
    def spares(self) -> list[int]:
        """As `CenterEnd.spares`."""
        return [peer.index for peer in self._peers.all if peer.commit.requests & SPARE and peer.state is not State.LOST]

    @property
    def progress(self) -> int:
        """Changes whenever a header, or a piece of a vector, was received or sent."""
        return self._ticks.count

    @property
    def buffers_allocated(self) -> int:
        """Vectors allocated beside c."""
        return self._vectors.messages.allocated

    def open(self) -> None:
        """Begin a session of all workers."""
        self._left = 0
        self._vectors.pulls.forget()
        self._expected = {peer.index for peer in self._peers.all if peer.state is not State.LOST} - self.silent
        for peer in self._peers.at(State.LEFT):
            self._listen_to(peer)

    def admit(self, comm: MPI.Comm) -> int:
        """As `CenterEnd.admit`."""
        peer = self._peers.admit(comm)
        self._listeners.append(Listener(comm, [peer], self.c))
        self._expected.add(peer.index)
        self.dispensable.add(peer.index)
        return peer.index

    def bury(self, worker: int) -> None:
        """As `CenterEnd.bury`."""
        self._bury(self._peers.all[worker])

    # One message, from its header to its reply.

    def serve_one(self, apply: Apply) -> bool:
        """Serve the first complete message, and make progress on all others; not to be called during an apply.

        A request without payload for which `apply` returns None is parked, and tried again after each later message,
        until `apply` returns a reply.
        """
        assert self._serving is None, "serve_one was called during an apply"
        if not self._peers.any(State.READY) or time.perf_counter() >= self._poll_at:
            self._poll()
        self._report_lost()
        if (peer := self._peers.first(State.READY)) is None:
            return time.perf_counter() >= self._retry_at and self._serve_parked(apply)
        if not self._vectors.may_serve(peer.commit, self._lent(), len(self._used_by_silent())):
            self._poll_at = 0.0  # for the reply that reads c
            return False
        self._serve(peer, apply)
        if self._peers.any(State.PARKED):
            self._serve_parked(apply)
        self._report_lost()  # who has died while they were answered
        return True

    def _serve(self, peer: Peer, apply: Apply) -> None:
        commit, buffer = peer.commit, peer.buffer
        if commit.requests & SPARE:
            self._peers.move(peer, State.SPARE)
            self._expected.discard(peer.index)
            self._answer_left()
            return
        peer.buffer, self._serving = None, peer
        self._peers.move(peer, State.ANSWERING)
        reply = apply(commit if buffer is None else commit._replace(payload=buffer.delta), self.c)
        self._serving = None
        self.in_flight_deltas -= commit.nbytes > 0
        if buffer is not None:
            self._vectors.messages.release(buffer, self._lent())
        if peer.state is State.LOST:
            return
        if reply is None:
            self._peers.move(peer, State.PARKED)
        else:
            self._served(peer, reply)

    def _served(self, peer: Peer, reply: Reply) -> None:
        """Answer a message; those who leave when all have left."""
        if peer.commit.requests & LEAVE:
            self._peers.move(peer, State.LEFT)
            self._expected.discard(peer.index)
            self._left, self._leave_reply = self._left + 1, reply
            self._answer_left()
        else:
            self._answer(peer, reply)

    def _serve_parked(self, apply: Apply) -> bool:
        """Answer the parked requests for work, as long as there is some; whether one was answered."""
        answered = False
        while (peer := self._peers.first(State.PARKED)) and (reply := apply(peer.commit, self.c)) is not None:
            self._peers.move(peer, State.ANSWERING)
            self._served(peer, reply)
            answered = True
        # Work may also become free without a message (a lost worker), and all may be asked to stop.
        self._retry_at = time.perf_counter() + _RETRY
        self._go_on_without(self._expected)
        return answered

    def change(self, change: Callable[[Array], None]) -> bool:
        """As `CenterEnd.change`: once no reply reads c, or it is copied."""
        if not self._vectors.may_serve(Commit(0, nbytes=self.c.nbytes), self._lent(), len(self._used_by_silent())):
            return False
        change(self.c)
        return True

    def retry(self) -> None:
        """As `CenterEnd.retry`."""
        self._retry_at = 0.0

    def _answer(self, peer: Peer, reply: Reply) -> None:
        """Begin a reply, with c if requested."""
        source = self._vectors.pulled(peer.commit, reply.clock, self._lent())
        if self._try(peer, partial(peer.reply, reply, source, self._ticks)):
            self._push(peer)

    def _push(self, peer: Peer) -> None:
        """Make progress on a reply; once it is sent, go on with that worker's next message."""
        if peer.answer is None or not self._try(peer, peer.answer.test):
            return
        answer, peer.answer = peer.answer, None
        self._done_reading(answer)
        if peer.commit.requests & LEAVE:
            self._peers.move(peer, State.LEFT)
        else:
            self._listen_to(peer)

    def _done_reading(self, answer: Answer) -> None:
        if answer.stream is not None:
            self._vectors.done_reading(answer.buffer, self._lent())

    def _used_by_silent(self) -> set[Buffer]:
        return set[Buffer]().union(*(self._peers.all[i].buffers_in_use for i in self.silent)) if self.silent else set()

    def _lent(self) -> int:
        """Message buffers in use by silent workers, as `Vectors` says."""
        return len(self._used_by_silent() - {self._vectors.center})

    # Polling: receives headers and deltas, sends replies. It applies and reports nothing and does not change c: so it
    # may run during an apply.

    def move_on(self, stop: int) -> None:
        """While a commit is being applied, and c is done up to element `stop`: send that part, and poll.

        Its worker may turn out to be dead here, as any other. `serve_one` reports it later.
        """
        peer = self._serving
        follows = peer and peer.state is not State.LOST and peer.commit.requests & (PULL | ENCODED) == PULL
        if peer and follows and self.c.nbytes > INLINE:
            self._try(peer, partial(peer.send, self._vectors.center, stop, self._ticks))
        if self.live > 1 and time.perf_counter() >= self._poll_at:
            self._poll()

    def _poll(self) -> None:
        begin = time.perf_counter()
        self._listen()
        self._receive()
        if self._peers.any(State.ANSWERING):
            self.flush()
        self._poll_at = (end := time.perf_counter()) + max(_PAUSE, 10 * (end - begin))

    def _listen(self) -> None:
        """Receive the headers that have arrived."""
        try:
            for listener in self._listeners:
                while message := listener.poll():
                    self._received(*message)
        except MPI.Exception as error:
            if self.on_loss is None or not peer_failed(error) or not (dead := self._listeners[0].dead()):
                raise  # with nobody dead it is revoked
            for peer in dead:
                self._bury(peer)

    def _received(self, peer: Peer, commit: Commit) -> None:
        self._ticks.count += 1
        if peer.state is State.LOST:
            return
        self._not_silent(peer)
        peer.inbox.append(commit)
        if peer.state is State.LISTENING:
            self._listen_to(peer)

    def _listen_to(self, peer: Peer) -> None:
        """Go on with the next message of a worker, if it has arrived; its messages are served in order."""
        self._peers.move(peer, State.LISTENING)
        if not peer.inbox:
            return
        peer.commit = peer.inbox.popleft()
        if peer.commit.nbytes:
            self._peers.move(peer, State.QUEUED)
        else:
            self._complete(peer)

    def _complete(self, peer: Peer) -> None:
        self._not_silent(peer)
        self._peers.move(peer, State.READY)
        if self.on_whole is not None:
            self.on_whole(peer.commit)

    def _receive(self) -> None:
        """Start receives of queued deltas in free buffers, and finish those that have arrived."""
        # One delta at a time, while it makes progress: the reply to one is sent while the next arrives, so both
        # directions of the link are busy. Received together, all would complete at the same time, with no reply before.
        if self._peers.any(State.QUEUED):
            busy = any(peer.delta and peer.delta.busy for peer in self._peers.at(State.RECEIVING))
            while not busy and (peer := self._next_delta()) and self._start(peer):
                busy = peer.delta is not None and peer.delta.busy
        for peer in self._peers.at(State.RECEIVING):
            if peer.delta and self._try(peer, peer.delta.test):
                if peer.buffer is not None:
                    peer.buffer.wire.settle(peer.buffer.delta)
                self._complete(peer)

    def _next_delta(self) -> Peer | None:
        """The first that waits for a buffer and is not on hold."""
        if self.hold is None:
            return self._peers.first(State.QUEUED)
        return next((peer for peer in self._peers.at(State.QUEUED) if not self.hold(peer.commit)), None)

    def _start(self, peer: Peer) -> bool:
        """Begin to receive a delta; False if no buffer is free. A misfit is received and discarded."""
        if peer.commit.payload is not None:  # it came with its header
            self.in_flight_deltas += 1
            self._complete(peer)
            return True
        if not peer.commit.flags & MISFIT:
            peer.buffer = self._vectors.messages.acquire(self._lent())
            if peer.buffer is None:
                return False
        delta = peer.receive(self._ticks)
        self._peers.move(peer, State.RECEIVING)
        self.in_flight_deltas += 1
        # The stream belongs to the peer already: if a later receive fails, the memory of the posted ones lives on
        # there.
        self._try(peer, partial(delta.extend, ALL))
        return True

    def flush(self) -> bool:
        """As `CenterEnd.flush`."""
        for peer in self._peers.at(State.ANSWERING):
            self._push(peer)
        return self._peers.unanswered <= self.silent

    # Workers that leave, become silent, return or die.

    def _answer_left(self) -> None:
        """Answer the workers that have left, once all have."""
        self._call_spares()
        if self.live or self._leave_reply is None:
            return
        reply, self._leave_reply = self._leave_reply, None
        for peer in [*self._peers.at(State.LEFT), *self._peers.at(State.SPARE)]:
            self._peers.move(peer, State.ANSWERING)
            self._answer(peer, reply._replace(control=UNCALLED) if peer.commit.requests & SPARE else reply)
        wait_until(lambda: not self.while_waiting() and (self.flush() or self._go_on_without(self._peers.unanswered)))

    def _call_spares(self) -> None:
        """Let spares that wait take the places of workers that are lost, or that nobody waits for."""
        spares = sorted(self._peers.at(State.SPARE), key=lambda peer: peer.index)
        workers = len(self._peers.all) - len(self.lost | self.silent) - len(spares)
        for peer in spares[: max(0, self._kept - workers)]:
            self._expected.add(peer.index)
            self.dispensable.discard(peer.index)
            peer.commit = peer.commit._replace(requests=peer.commit.requests & ~SPARE)
            self._peers.move(peer, State.READY)
            if self.on_join is not None:
                self.on_join(peer.index)

    def _not_silent(self, peer: Peer) -> None:
        if peer.index in self.silent:
            self.silent.discard(peer.index)
            self._expected.add(peer.index)

    def stop_waiting_for(self, worker: int) -> None:
        """Wait for this silent worker no longer; it takes part again when it sends something."""
        if worker not in {*self._expected, *self.spares}:
            return
        # Its messages keep their buffers; the others get as many extra.
        self._expected.discard(worker)
        self.silent.add(worker)
        self._answer_left()
        self._report_lost()

    def _go_on_without(self, awaited: set[int]) -> bool:
        """Wait for these no longer, if nothing moves, and they hold up the end: spares that hang, or have joined."""
        late = awaited - self.silent
        if not late or not late <= self.dispensable or not self._stands_still(self.progress):
            return False
        leave_behind = self.stop_waiting_for if self._kept else self.bury  # no job has both
        for worker in late:
            leave_behind(worker)
        return True

    def _try(self, peer: Peer, call: Callable[[], bool | None]) -> bool:
        """Make an MPI call that involves one worker; if that is dead, discard its messages, and go on without."""
        try:
            return call() is not False
        except MPI.Exception as error:
            if self.on_loss is None or not peer_failed(error):
                raise
            self._bury(peer)
            return False

    def _bury(self, peer: Peer) -> None:
        """Discard the messages of a dead worker; it is reported between two messages, not during an apply."""
        if peer.state is State.LOST:
            return
        if peer.state in (State.RECEIVING, State.READY):
            self.in_flight_deltas -= peer.commit.nbytes > 0
        if peer.buffer is not None and peer.state is State.READY:
            self._vectors.messages.release(peer.buffer, self._lent())
        elif peer.buffer is not None:
            self._vectors.messages.abandon()
        if peer.answer is not None:
            self._done_reading(peer.answer)
        self._peers.move(peer, State.LOST)
        self._dying.append(peer)

    def _report_lost(self) -> None:
        while self._dying:
            worker = self._dying.popleft().index
            self.lost.add(worker)
            self._expected.discard(worker)
            self.silent.discard(worker)
            self._retry_at = 0.0  # its leases are free
            if self.on_loss is not None:
                self.on_loss(worker)
            self._answer_left()
