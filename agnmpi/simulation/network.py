"""Ends in virtual time: messages travel, queue at the center and are served by the clock of an event queue."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf, nextafter

from ..arrays.backend import Array, full_like
from ..arrays.encodings import NAMES, Encoding, get
from ..core.ends import Apply, WorkerEnd
from ..core.leases import NONE, Lease
from ..core.messages import ENCODED, LEAVE, NOT_FINITE, PULL, STOP, WORK, Commit, Reply
from ..transport.local import LocalCenter, LocalHandle
from .timing import Timing


class Agenda:
    """A queue of events in order of time; ties are resolved by `tie(worker)`, then by order of insertion."""

    def __init__(self, tie: Callable[[int], float] = float) -> None:
        self.now = 0.0
        self._tie, self._count = tie, count()
        self._heap: list[tuple[float, float, int, Callable[[], None]]] = []

    def at(self, time: float, worker: int, act: Callable[[], None]) -> None:
        """Schedule `act`, an event of `worker`."""
        heappush(self._heap, (time, self._tie(worker), next(self._count), act))

    def run(self) -> None:
        """Run all events until none is left."""
        while self._heap:
            self.now, _, _, act = heappop(self._heap)
            act()


class Station:
    """A center in virtual time: one message at a time, in order of arrival.

    At the end of its service a message is applied and the center read for its pull; then the reply is sent. A worker
    that waits for work is answered at the end of the service of the message that frees some, and delays nobody.
    """

    def __init__(self, agenda: Agenda, center: LocalCenter, timing: Timing) -> None:
        self._agenda, self._center, self._timing = agenda, center, timing
        self.pull_encoding = center.pull_encoding
        self._queue: deque[tuple[float, LocalHandle]] = deque()
        self._serving = False
        self._in_flight: dict[int, float] = {}  # arrival time of a worker's last message, while that is in flight
        self.served, self.longest = 0.0, 0  # seconds of service, longest queue
        self.waits: list[float] = []

    def send(self, commit: Commit, out: Array | None, answered: Callable[[], None]) -> LocalHandle:
        """Send `commit` now; `answered` is called when the reply has arrived."""
        handle = LocalHandle(self._center, commit, out)
        handle.on_reply = partial(self._answer, handle, answered)
        payload = 0 if commit.payload is None else commit.payload.nbytes
        arrival = self._agenda.now + (self._timing.transfer(payload) if payload else self._timing.latency)
        before = self._in_flight.get(commit.worker)
        if before is not None and arrival <= before:  # a worker's messages do not overtake each other
            arrival = nextafter(before, inf)
        self._in_flight[commit.worker] = arrival
        self._agenda.at(arrival, commit.worker, partial(self._arrive, handle))
        return handle

    def _answer(self, handle: LocalHandle, answered: Callable[[], None]) -> None:
        """Send the reply to `handle`."""
        pulled = 0 if handle.out is None else handle.out.nbytes
        self._agenda.at(self._agenda.now + self._timing.transfer(pulled), handle.commit.worker, answered)

    def _arrive(self, handle: LocalHandle) -> None:
        if self._in_flight[handle.commit.worker] == self._agenda.now:
            del self._in_flight[handle.commit.worker]
        self._center.put(handle)
        self._queue.append((self._agenda.now, handle))
        if self._serving:
            self.longest = max(self.longest, len(self._queue))
        else:
            self._serve_next()

    def _serve_next(self) -> None:
        arrival, handle = self._queue.popleft()
        payload = 0 if handle.commit.payload is None else handle.commit.payload.nbytes
        pulled = 0 if handle.out is None else handle.out.nbytes
        seconds = self._timing.serving(payload + pulled)
        self.waits.append(self._agenda.now - arrival)
        self.served += seconds
        self._serving = True

        def end() -> None:
            self._center.serve_one(self._center.apply)
            self._serving = False
            if self._queue:
                self._serve_next()

        self._agenda.at(self._agenda.now + seconds, handle.commit.worker, end)


class VirtualHandle:
    """An exchange under way; `then` is called when all replies have arrived.

    Args:
        missing: number of replies to come.
        reply: that grants the work: the first center's, once it is there.
    """

    def __init__(self, missing: int, reply: Reply | None = None) -> None:
        self.pieces: list[LocalHandle] = []  # with each center
        self.missing, self.reply = missing, reply
        self.then: Callable[[], None] | None = None

    def test(self) -> bool:
        """Whether virtual time has reached the last reply."""
        return not self.missing

    def wait(self) -> Reply:
        """Return the reply that grants the work; raises RuntimeError before all have arrived."""
        if self.missing or self.reply is None:
            raise RuntimeError("in virtual time nothing can block: resume when the handle is done")
        return self.reply

    def answered(self) -> None:
        """The reply to a piece has arrived."""
        self.missing -= 1
        if not self.missing and self.then is not None:
            self.then()


def _piece(x: Array | None, part: slice, encoding: Encoding) -> Array | None:
    """The numbers `part` of a vector, or their bytes: whole blocks."""
    if x is None:
        return None
    return x[part] if encoding.exact else x[encoding.nbytes(part.start) : encoding.nbytes(part.stop)]


class VirtualWorker(WorkerEnd):
    """A worker's end with one or several stations, each of which holds a slice of the center variable.

    Leaving does not wait for the others, as on transport.local.
    """

    def __init__(self, worker: int, stations: list[Station], parts: list[slice]) -> None:
        self._worker, self._stations = worker, stations
        self._parts = parts
        self._clocks = [0] * len(parts)  # of each center when this worker last pulled

    def exchange(self, commit: Commit, out: Array | None) -> VirtualHandle:
        """Send each center its slice of the commit."""
        exchange = VirtualHandle(len(self._parts))
        for i, (station, part) in enumerate(zip(self._stations, self._parts)):
            piece = commit._replace(
                payload=_piece(commit.payload, part, get(NAMES[commit.encoding])),
                clock=self._clocks[i] if i else commit.clock,
            )
            pulled = station.pull_encoding if commit.requests & ENCODED else get("float32")
            out_part = _piece(out, part, pulled)
            exchange.pieces.append(station.send(piece, out_part, partial(self._answered, exchange, i)))
        return exchange

    def _answered(self, exchange: VirtualHandle, i: int) -> None:
        piece = exchange.pieces[i]
        if piece.out is not None and piece.reply is not None:
            self._clocks[i] = piece.reply.clock
        if i == 0:
            exchange.reply = piece.reply
        exchange.answered()

    def pull(self, out: Array) -> VirtualHandle:
        """Ask for the center."""
        return self.exchange(Commit(self._worker, requests=PULL), out)

    def leave(self, commit: Commit | None, out: Array | None) -> VirtualHandle:
        """Send the last commit and then the message that this worker leaves."""
        if commit is not None:
            self.exchange(commit, None)
        return self.exchange(Commit(self._worker, requests=PULL | LEAVE), out)


class Meeting:
    """Rounds of all workers, as with Allreduce: each begins when the last has come, and takes twice a transfer.

    That is a ring's reduce-scatter and allgather of all bytes. Nobody serves: `c` stands for the replicas of all.

    Args:
        agenda: the clock.
        c: (n,) the center variable, moved in place.
        apply: the center step.
        rounds: the leases of each worker.
        timing: of transfers.
    """

    def __init__(self, agenda: Agenda, c: Array, apply: Apply, rounds: list[Iterator[Lease]], timing: Timing) -> None:
        self._agenda, self._c, self._apply, self._rounds, self._timing = agenda, c, apply, rounds, timing
        self._here: list[tuple[Commit, Array | None, VirtualHandle]] = []
        self._last = Reply(0)  # of the last round

    def read(self, commit: Commit, out: Array | None) -> VirtualHandle:
        """Read the replica, and grant work if `commit` asks for it: neither needs the others."""
        if out is not None:
            out[...] = self._c
        return VirtualHandle(0, self._reply(commit))

    def join(self, commit: Commit, out: Array | None) -> VirtualHandle:
        """Take part in the round with `commit`."""
        handle = VirtualHandle(1)
        self._here.append((commit, out, handle))
        if len(self._here) == len(self._rounds):
            time = self._agenda.now + 2 * self._timing.transfer(self._c.nbytes)
            self._agenda.at(time, commit.worker, self._end)
        return handle

    def _end(self) -> None:
        here, self._here = sorted(self._here, key=lambda part: part[0].worker), []
        commits = [commit for commit, _, _ in here if commit.steps]  # in the last round some may have had no step
        total, steps = full_like(self._c, 0), sum(commit.steps for commit in commits)
        for commit in commits:
            total += 0 if commit.payload is None else commit.payload
        last = self._apply(
            commits[0]._replace(
                requests=0,
                flags=NOT_FINITE if any(commit.flags & NOT_FINITE for commit in commits) else 0,
                clock=self._last.clock,
                steps=steps,
                commits=len(commits),
                loss=sum(commit.loss * commit.steps for commit in commits) / steps,
                payload=total,
            ),
            self._c,
        )
        assert last is not None  # a round is never postponed
        self._last = last
        for commit, out, handle in here:
            if out is not None:
                out[...] = self._c
            handle.reply = self._reply(commit)
        for _, _, handle in here:  # all read the same center before the first goes on
            handle.answered()

    def _reply(self, commit: Commit) -> Reply:
        granted = commit.requests & WORK and self._last.control != STOP
        return self._last._replace(work=next(self._rounds[commit.worker], NONE) if granted else NONE)


class MeetingWorker(WorkerEnd):
    """A worker's end at a `Meeting`."""

    def __init__(self, worker: int, meeting: Meeting) -> None:
        self._worker, self._meeting = worker, meeting

    def exchange(self, commit: Commit, out: Array | None) -> VirtualHandle:
        """Take part in a round with `commit`; without a payload, only read the replica and ask for work."""
        return (self._meeting.read if commit.payload is None else self._meeting.join)(commit, out)

    def pull(self, out: Array) -> VirtualHandle:
        """Read the replica."""
        return self._meeting.read(Commit(self._worker), out)

    def leave(self, commit: Commit | None, out: Array | None) -> VirtualHandle:
        """Read the last center; all have the same number of rounds, so that nothing is left to commit."""
        assert commit is None
        return self._meeting.read(Commit(self._worker), out)
