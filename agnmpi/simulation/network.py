"""Ends in virtual time: messages travel, queue before the center and are served when an agenda says so."""

from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf, nextafter

from ..arrays.backend import Array
from ..core.ends import WorkerEnd
from ..core.messages import LEAVE, PULL, Commit, Reply
from ..transport.local import LocalCenter, LocalHandle
from .timing import Timing


class Agenda:
    """What is to happen, in order of time; ties go by `tie(worker)`, then in the order in which they were entered."""

    def __init__(self, tie: Callable[[int], float] = float) -> None:
        self.now = 0.0
        self._tie, self._count = tie, count()
        self._heap: list[tuple[float, float, int, Callable[[], None]]] = []

    def at(self, time: float, worker: int, act: Callable[[], None]) -> None:
        """Enter `act`, which concerns `worker`."""
        heappush(self._heap, (time, self._tie(worker), next(self._count), act))

    def run(self) -> None:
        """Let all happen, until nothing is left."""
        while self._heap:
            self.now, _, _, act = heappop(self._heap)
            act()


class Station:
    """A center in virtual time: one message at a time, in order of arrival.

    At the end of its service a message is applied, and what it pulls is read; then the reply goes its way. Who waits
    for work is answered at the end of the service of the message that frees some, and keeps nobody waiting.
    """

    def __init__(self, agenda: Agenda, center: LocalCenter, timing: Timing) -> None:
        self._agenda, self._center, self._timing = agenda, center, timing
        self._line: deque[tuple[float, LocalHandle]] = deque()
        self._serving = False
        self._flying: dict[int, float] = {}  # arrival of a worker's last message, while that is on its way
        self.served, self.longest = 0.0, 0  # seconds of service, longest line
        self.waits: list[float] = []

    def send(self, commit: Commit, out: Array | None, answered: Callable[[], None]) -> LocalHandle:
        """Send `commit` off now; `answered` is called when the reply has come back."""
        handle = LocalHandle(self._center, commit, out)
        handle.on_reply = partial(self._answer, handle, answered)
        payload = 0 if commit.payload is None else commit.payload.nbytes
        arrival = self._agenda.now + (self._timing.transfer(payload) if payload else self._timing.latency)
        before = self._flying.get(commit.worker)
        if before is not None and arrival <= before:  # a worker's messages do not overtake each other
            arrival = nextafter(before, inf)
        self._flying[commit.worker] = arrival
        self._agenda.at(arrival, commit.worker, partial(self._arrive, handle))
        return handle

    def _answer(self, handle: LocalHandle, answered: Callable[[], None]) -> None:
        """The reply to `handle` goes its way."""
        pulled = 0 if handle.out is None else handle.out.nbytes
        self._agenda.at(self._agenda.now + self._timing.transfer(pulled), handle.commit.worker, answered)

    def _arrive(self, handle: LocalHandle) -> None:
        if self._flying[handle.commit.worker] == self._agenda.now:
            del self._flying[handle.commit.worker]
        self._center.put(handle)
        self._line.append((self._agenda.now, handle))
        if self._serving:
            self.longest = max(self.longest, len(self._line))
        else:
            self._take_up()

    def _take_up(self) -> None:
        arrival, handle = self._line.popleft()
        payload = 0 if handle.commit.payload is None else handle.commit.payload.nbytes
        pulled = 0 if handle.out is None else handle.out.nbytes
        seconds = self._timing.serving(payload + pulled)
        self.waits.append(self._agenda.now - arrival)
        self.served += seconds
        self._serving = True

        def end() -> None:
            self._center.serve_one(self._center.apply)
            self._serving = False
            if self._line:
                self._take_up()

        self._agenda.at(self._agenda.now + seconds, handle.commit.worker, end)


class VirtualHandle:
    """An exchange under way, a piece with each center; `then` is called when all have been answered."""

    def __init__(self) -> None:
        self.pieces: list[LocalHandle] = []
        self.missing = 0
        self.then: Callable[[], None] | None = None

    def test(self) -> bool:
        """Whether virtual time has reached the last reply."""
        return not self.missing

    def wait(self) -> Reply:
        """Return the reply of the first center, which also grants the work; raises RuntimeError before it is there."""
        reply = self.pieces[0].reply
        if self.missing or reply is None:
            raise RuntimeError("in virtual time nothing can wait: go on when the handle is done")
        return reply

    def answered(self) -> None:
        """A piece has come back."""
        self.missing -= 1
        if not self.missing and self.then is not None:
            self.then()


class VirtualWorker(WorkerEnd):
    """A worker's end with one or several stations, each of which holds a slice of the center variable.

    Leaving does not wait for the others, as on transport.local.
    """

    def __init__(self, worker: int, stations: list[Station], parts: list[slice]) -> None:
        self._worker, self._stations, self._parts = worker, stations, parts
        self._clocks = [0] * len(parts)  # of each center when this worker last pulled

    def exchange(self, commit: Commit, out: Array | None) -> VirtualHandle:
        """Send each center its slice of the commit."""
        whole = VirtualHandle()
        whole.missing = len(self._parts)
        for i, (station, part) in enumerate(zip(self._stations, self._parts)):
            piece = commit._replace(
                payload=None if commit.payload is None else commit.payload[part],
                clock=self._clocks[i] if i else commit.clock,
            )
            mine = None if out is None else out[part]
            whole.pieces.append(station.send(piece, mine, partial(self._answered, whole, i)))
        return whole

    def _answered(self, whole: VirtualHandle, i: int) -> None:
        piece = whole.pieces[i]
        if piece.out is not None and piece.reply is not None:
            self._clocks[i] = piece.reply.clock
        whole.answered()

    def pull(self, out: Array) -> VirtualHandle:
        """Ask for the center."""
        return self.exchange(Commit(self._worker, requests=PULL), out)

    def leave(self, commit: Commit | None, out: Array) -> VirtualHandle:
        """Send the last commit and, behind it, the farewell."""
        if commit is not None:
            self.exchange(commit, None)
        return self.exchange(Commit(self._worker, requests=PULL | LEAVE), out)
