"""The end of a node center: it serves the workers of its host, and is itself one worker of the center above."""

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from math import ceil

from ..arrays.backend import Array, empty_like, full_like
from ..core.center import Center
from ..core.ends import Apply, CenterEnd, Chained, Handle, WorkerEnd
from ..core.leases import Leases, Shares, merged
from ..core.messages import IDLE, LEAVE, NOT_FINITE, REFUSED, STOP, STOP_ALL, WAIT, WORK, Commit, Reply
from ..core.rules import downpour

_AHEAD = 2  # periods that are there for each worker when work comes from above


class _Phase(Enum):
    """What a node center does in a session."""

    BEGINNING = auto()  # waits for c and work from above: nobody is served yet
    SERVING = auto()
    ENDING = auto()  # its last worker wants to leave
    LEAVING = auto()  # has sent its last sum, and waits for the other hosts
    LEFT = auto()  # has the final center: its workers may have it


class NodeEnd(CenterEnd):
    """A center's end made of two: `below` serves the workers of this host, `above` exchanges with the center above.

        a commit of a worker:    c ← c + its weight · its delta
        when D have come:        send c − o, as one commit of D
        when its pull c' comes:  c ← c' + (c − c_sent),  o ← c'

    D is the number of its workers, or more where the exchange before was still under way: while it is, each worker may
    take two further periods. No more than these: what a slow link holds back is old when it comes. Clock and steps of
    its center are those of the whole tree, as far as known here. Steps whose commits are refused here are reported
    above, which grants them again.

    Args:
        below: has c; float32.
        above: may encode.
        center: applies the commits of its workers; its leases are `Shares`.
        number: of this node, among the workers of the center above.

    Source: HALoS, arXiv:2506.04531 (two levels of asynchronous centers); BytePS, OSDI 2020 (sums within a machine).
    """

    def __init__(self, below: CenterEnd, above: WorkerEnd, center: Center, number: int) -> None:
        self.below, self.above, self.center, self._number = below, above, center, number
        c, buffers = below.c, center.rule.buffers
        self._sum_rule = downpour()._replace(buffers=buffers)
        self._o, self._sent, self._delta, self._pulled = (empty_like(c) for _ in range(4))
        self._summed_buffers = full_like(c[c.size - buffers :], 0)
        self._sequence = self._clock = self._events = 0  # clock: of the center above at the last pull
        self._loss = 0.0  # of the steps in the sum, added up
        self._phase = _Phase.LEFT
        self._handle: Handle | None = None  # of the exchange under way
        self._after: Callable[[Reply, Array], None] = self._adopt  # what follows it
        self._asked = self._fruitful = False  # whether it, and the last that did, asked for work and found some
        self._stopped = False  # whether the center above knows that all shall stop

    @property
    def c(self) -> Array:
        """(n,) the center variable, as this host knows it."""
        return self.below.c

    @property
    def live(self) -> int:
        """Workers of this host that have not left this session."""
        return self.below.live

    @property
    def progress(self) -> int:
        """Changes whenever something was received or sent below, or an exchange above begins or ends."""
        return self.below.progress + self._events

    @property
    def _shares(self) -> Shares:
        shares = self.center.leases
        assert isinstance(shares, Shares)
        return shares

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """Begin a session on both sides."""
        self.below.begin(total, period, work)
        self.above.begin(total, period, work)

    def open(self) -> None:
        """Begin to serve; the workers are answered once c is here."""
        self._phase, self._stopped = _Phase.BEGINNING, False
        self.below.open()

    def serve_one(self, apply: Apply) -> bool:
        """Make progress above, and serve below."""
        if self._handle is None:
            self._start()
        elif self._handle.test():
            self.below.change(self._finish)
        return self._phase is not _Phase.BEGINNING and self.below.serve_one(partial(self._apply, apply))

    def move_on(self, stop: int) -> None:
        """While a commit is applied: make progress on both sides."""
        self.below.move_on(stop)
        if self._handle is not None:
            self._handle.test()

    def close(self) -> None:
        """Free what the ends hold; collective."""
        self.below.close()
        self.above.close()

    def _apply(self, apply: Apply, commit: Commit, c: Array) -> Reply | None:
        """Apply a message from below; the last worker's leaving waits for the final center."""
        if commit.requests & LEAVE and self.below.live == 1 and self._phase is not _Phase.LEFT:
            if self._phase is _Phase.SERVING:
                self._phase = _Phase.ENDING
            return None
        before = len(self._shares.done)
        reply = apply(commit, c)
        if len(self._shares.done) > before:
            self._loss += commit.loss * commit.steps
            if self._summed_buffers.size and commit.payload is not None:
                self._summed_buffers += commit.payload[-self._summed_buffers.size :]
        return reply

    # One exchange with the center above, from its start to its end.

    def _start(self) -> None:
        """Start the next exchange, if there is reason for one."""
        shares, pulled, exchange = self._shares, self._pulled, self.above.exchange
        idle = not shares.lent and not shares.stock  # nothing more comes from below before something comes from above
        if self._phase is _Phase.BEGINNING:
            self._begun(exchange(self._request(), pulled), self._replace)
        elif self.center.control == STOP and not self._stopped:  # a worker wants that
            self._stopped = True
            self._begun(exchange(Commit(self._number, requests=STOP_ALL), None), _take_nothing)
        elif self._phase is _Phase.ENDING:
            self._phase = _Phase.LEAVING
            self._begun(
                Chained(*self._refusals(), self.above.leave(self._sum(None) if shares.done else None, pulled)),
                self._replace,
            )
        elif self._phase is not _Phase.SERVING:
            pass
        elif len(shares.done) >= self.live or (idle and shares.done):
            self._begun(Chained(*self._refusals(), exchange(self._sum(self._request()), pulled)), self._adopt)
        elif idle and (shares.more or shares.refused):
            self._sent[...] = self.c
            self._begun(Chained(*self._refusals(), exchange(self._request(IDLE), pulled)), self._adopt)
        elif shares.more and self._fruitful and not shares.stock:
            self._begun(exchange(self._request(), None), _take_nothing)

    def _begun(self, handle: Handle, after: Callable[[Reply, Array], None]) -> None:
        self._handle, self._after = handle, after
        self._events += 1

    def _finish(self, c: Array) -> None:
        """An exchange is done, and c may change: take what it brings."""
        assert self._handle is not None
        reply, self._handle = self._handle.wait(), None
        shares, center = self._shares, self.center
        self._after(reply, c)
        if reply.control == STOP:
            center.control, shares.more, self._stopped = STOP, False, True
        elif self._asked:
            shares.add(reply.work)
            shares.more = self._fruitful = reply.work.steps > 0
            shares.more |= reply.control == WAIT
        center.checkpoint = max(center.checkpoint, reply.checkpoint)
        self._events += 1
        self.below.retry()

    def _request(self, requests: int = 0) -> Commit:
        """A request for so much work that two periods are there for each worker."""
        shares = self._shares
        wanted = ceil(_AHEAD * self.live - shares.stock)
        self._asked = wanted > 0
        requests |= WORK if self._asked else 0
        return Commit(self._number, requests=requests, total=shares.encoded_total, wanted=wanted)

    def _refusals(self) -> list[Handle]:
        """Report the steps whose commits were refused: a commit that is not finite, without its numbers."""
        refused, self._shares.refused = self._shares.refused, []
        return [
            self.above.exchange(self._commit(lease.steps, lease.first)._replace(flags=NOT_FINITE), None)
            for lease in refused
        ]

    def _commit(self, steps: int, first: int) -> Commit:
        self._sequence += 1
        return Commit(self._number, self._sequence, steps, first, self._clock)

    def _sum(self, request: Commit | None) -> Commit:
        """The commits since the last sum, as one, with what `request` asks for."""
        shares, c, delta = self._shares, self.c, self._delta
        finite = self._sum_rule.form_commit(c, self._o, c, 1, delta)
        if self._summed_buffers.size:
            delta[-self._summed_buffers.size :] = self._summed_buffers / len(shares.done)
            self._summed_buffers[...] = 0
        self._sent[...] = c
        parts, steps = merged(shares.done), sum(lease.steps for lease in shares.done)
        commit = self._commit(steps, parts[0].first)._replace(
            commits=len(shares.done), flags=0 if finite else NOT_FINITE, loss=self._loss / steps,
            parts=tuple(parts) if len(parts) > 1 else (), payload=delta,
        )  # fmt: skip
        if request is not None:
            commit = commit._replace(requests=request.requests, wanted=request.wanted)
        self._loss = 0.0
        shares.done.clear()
        return commit

    def _adopt(self, reply: Reply, c: Array) -> None:
        """Take up a pull, and keep what was committed here since it was asked for."""
        shares, center = self._shares, self.center
        self._swap_in_pull(reply)
        if reply.status == REFUSED:  # the sum is not finite, and so is c
            c[...] = self._o
            for lease in merged(shares.done):
                shares.add(lease)
            shares.done.clear()
            self._loss = 0.0
            self._summed_buffers[...] = 0
        else:
            self._sum_rule.adopt_pull(c, self._sent, self._delta, self._o)
        center.clock = max(center.clock, reply.clock + len(shares.done))  # not back: workers have pulled at it
        center.steps = reply.steps + sum(lease.steps for lease in shares.done)

    def _replace(self, reply: Reply, c: Array) -> None:
        """Take up the center above as it is: at the beginning, and the final one."""
        self._swap_in_pull(reply)
        c[...] = self._o
        self.center.clock, self.center.steps = reply.clock, reply.steps
        self._phase = _Phase.SERVING if self._phase is _Phase.BEGINNING else _Phase.LEFT

    def _swap_in_pull(self, reply: Reply) -> None:
        self._o, self._pulled = self._pulled, self._o
        self._clock = reply.clock


def _take_nothing(_reply: Reply, _c: Array) -> None:
    """What follows an exchange without a pull."""
