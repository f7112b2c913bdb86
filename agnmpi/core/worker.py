"""A worker: its state and three steps, and the one loop that drives them.

Code that must wait is a generator of the handles to wait for: over MPI each is waited for at once; a driver with a
virtual clock (`simulate`) resumes it when the handle is done.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import Enum, auto
from math import nan
from typing import Any

from ..arrays.backend import Array, Range, empty_like, zeros_like
from ..arrays.kernels import all_finite
from .backoff import check_launcher
from .ends import Elected, Handle, Waits, WorkerEnd, awaited, run_waits
from .leases import Held
from .messages import IDLE, NOT_FINITE, PULL, REFUSED, SPARE, STOP, STOP_ALL, UNCALLED, WAIT, WORK, Commit, Reply
from .optimizers import Optimizer
from .rules import Rule


class Phase(Enum):
    """The phase of a worker."""

    NEW = auto()  # has not begun
    RESUMED = auto()  # likewise, with the state of a checkpoint
    TRAINING = auto()  # has begun from the center
    LEAVING = auto()  # has sent its last message; the others go on
    LEFT = auto()  # has the final center; may begin another session
    ELECTED = auto()  # this rank serves now


class _Buffers:
    """The vectors (n,) of an exchange, beside x and o.

    `sent` is x when the delta was formed, x itself where nothing changes it meanwhile; MPI writes into `pulled`, which
    is o itself where o may be overwritten during a pull.
    """

    def __init__(self, x: Array, o: Array, copy_sent: bool, double_buffer: bool) -> None:
        self.delta = empty_like(x)
        self.sent = empty_like(x) if copy_sent else x
        self.pulled = empty_like(x) if double_buffer else o


class Worker:
    """The parameters x, the center o as last pulled, and the leases of a worker.

    Args:
        x: (n,) parameters, moved in place.
        rule: of the exchange.
        optimizer: the local optimizer, None if the caller moves x.
        end: the connection to the center.
        index: 0 … n−1.
        overlap: compute the next period while the exchange of the last is under way.
        double_buffer: keep `o` intact during the next pull: if the center is lost, this rank may take over with it.
        wait: False: overlap, and while an exchange is under way go on after λ steps, as far as the leases reach.

    Raises:
        ValueError: the rule needs gradients, and there is no optimizer.

    >>> import numpy as np
    >>> from agnmpi.core import rules
    >>> from agnmpi.core.center import Center
    >>> from agnmpi.core.leases import Leases
    >>> from agnmpi.core.optimizers import sgd
    >>> from agnmpi.transport.local import LocalCenter
    >>> c = np.zeros(1)
    >>> center = Center(rules.agn(), c, workers=1)
    >>> center.leases = Leases(total=None, period=2)
    >>> end = LocalCenter(c, 1, center.apply).worker_end(0)
    >>> worker = Worker(np.ones(1), rules.agn(), sgd(0.5), end, 0)
    >>> for step in worker.steps():
    ...     worker.step(np.full(1, -1.0))
    ...     if step == 3:
    ...         break
    >>> c
    array([1.])
    """

    def __init__(
        self,
        x: Array,
        rule: Rule,
        optimizer: Optimizer | None,
        end: WorkerEnd,
        index: int,
        overlap: bool = False,
        double_buffer: bool = False,
        wait: bool = True,
    ) -> None:
        if optimizer is None and rule.accumulates:
            raise ValueError("variant 'gradient' needs the gradients: give an optimizer, or use 'displacement'")
        self.x, self.rule, self.optimizer, self.end, self.index = x, rule, optimizer, end, index
        self.overlap = overlap = overlap or not wait
        self.phase = Phase.NEW
        # Leases to hold beyond the one being computed: their samples are loaded; with overlap at least 1.
        self.ahead = 0
        self.state: Any = optimizer.init(x) if optimizer else None
        self.x_at_leave = x  # x when this worker left, before the final center replaced it
        self.o = empty_like(x)  # the center as last pulled
        self.a = zeros_like(x) if rule.accumulates else x
        self._buffers = _Buffers(x, self.o, overlap, overlap or double_buffer)
        self.last_reply: Reply | None = None  # to the last pull
        self.pulls = self.refusals = 0  # numbers of pulls, and of commits of this worker that were refused
        self.more: Callable[[], Mapping[str, Array]] = dict  # arrays of the caller's, saved with this worker's
        self.form_x: Callable[[], object] = bool  # called before x is read, where the caller moves arrays of its own
        self.spare = False  # has not begun, and does only when the center calls it in the place of a lost worker
        self.session = 0  # sessions begun
        self.total: int | None = None  # steps of this session, over all workers
        self.before = 0  # steps of all workers in earlier sessions: schedules continue
        self.sequence = 0  # commits sent
        self.checkpoint = 0  # steps at the newest checkpoint: this worker's state is saved for it
        self.held = Held(wait)
        self._loss = 0.0  # summed over the steps done since the last exchange was started
        self.dropped = 0  # steps that entered no round, because another rank left early
        self.samples = 0  # that its own data have had so far; 0: it shares all data with the others
        self._work_may_come = False  # other workers hold leases
        self._commit: Commit | None = None
        self._handle: Handle | None = None  # of the exchange under way, or of leaving
        self._process = os.getpid()

    @property
    def clock(self) -> int:
        """The center's clock at the last pull."""
        return self.last_reply.clock if self.last_reply else 0

    @property
    def elected(self) -> bool:
        """Whether this rank serves now, instead of training."""
        return self.phase is Phase.ELECTED

    @property
    def leaving(self) -> bool:
        """Whether `settle` has to wait."""
        return self.phase is Phase.LEAVING

    @property
    def under_way(self) -> Commit | None:
        """The commit that was formed and has no reply yet."""
        return self._commit

    def local_step(self, g: Array | None, loss: float = nan, ranges: Sequence[Range] | None = None) -> None:
        """Move x by one step of the local optimizer on g, and accumulate g if the rule asks for it.

        Args:
            g: (n,) gradient, None when the caller has moved x.
            loss: training loss of the step.
            ranges: the pieces of x that have a gradient, all if None.

        Raises:
            ValueError: there is an optimizer, but no gradient.
        """
        if self.optimizer is not None:
            if g is None:
                raise ValueError("local_step needs a gradient")
            at = self.before + self.held.number
            if ranges is None and self.rule.buffers:
                ranges = [(0, self.x.size - self.rule.buffers)]
            self.state = self.optimizer.update(g, self.state, self.x, step=at, ranges=ranges)
            if self.rule.accumulates:
                for lo, hi in ranges or [(0, g.size)]:
                    a = self.a[lo:hi]
                    a += g[lo:hi]
        self.held.done += 1
        self._loss += loss

    def step(self, g: Array | None, loss: float = nan, ranges: Sequence[Range] | None = None) -> None:
        """The loop's body: a `local_step`, and the exchange when the period is complete."""
        self.local_step(g, loss, ranges)
        self._run(self.waits_after_step())

    def waits_after_step(self) -> Waits[None]:
        """After a local step: finish the exchange under way, if that is done or no step is left; start one if due."""
        check_launcher()  # with accumulate nothing else waits for another rank
        if self._handle is None or self.held.is_used_up or self._handle.test():
            yield from self._exchange()

    # --- an exchange ---

    def start_exchange(self) -> None:
        """Form the delta of the steps done, and start the exchange."""
        self._commit = self._form_commit(WORK, self.end.forms_deltas)
        if self.rule.pulls == "before":
            self._handle = self.end.pull(self._buffers.pulled)
            return
        if self.overlap:
            self._buffers.sent[...] = self.x
        self._handle = self.end.exchange(self._commit, self._buffers.pulled)

    def _form_commit(self, requests: int, by_end: bool = False) -> Commit:
        """The commit of the steps done; `by_end`: the end forms its delta, if the rule allows."""
        self.form_x()
        steps, loss, payload, flags = self.held.done, self._loss, self._buffers.delta, 0
        parts = self.held.take()
        divisor = self.rule.divisor(max(steps, 1)) if by_end else None
        if divisor:
            payload = self._buffers.sent
        elif self.rule.pulls == "after":
            flags = self._form_delta(steps)
        elif self.overlap and not all_finite(self.x):  # the delta is formed after the pull, and x has changed by then
            flags = NOT_FINITE
        if self.rule.accumulates:
            self.a[...] = 0
        self.sequence += 1
        self._loss = 0.0
        sent = self.index, self.sequence, steps, parts[0].first, self.clock
        return Commit(
            *sent, requests=requests, flags=flags, wanted=self.held.wanted(self.ahead), samples=self.samples,
            loss=loss / steps if steps else nan, parts=tuple(parts) if len(parts) > 1 else (),
            payload=payload, origin=(self.o, divisor) if divisor else None,
        )  # fmt: skip

    def _form_delta(self, steps: int) -> int:
        """Write the delta of `steps` steps; returns the flags about it."""
        delta = self._buffers.delta
        return 0 if self.rule.form_commit(self.x, self.o, self.a, max(steps, 1), delta) else NOT_FINITE

    def finish_exchange(self) -> None:
        """Wait for the exchange under way, if any, and adopt its pull."""
        if self._handle is not None:
            run_waits(self._finish_exchange())

    def _finish_exchange(self) -> Waits[None]:
        assert self._handle is not None
        assert self._commit is not None
        if self.overlap:  # else x is as it was sent
            self.form_x()
        handle, self._handle = self._handle, None
        reply = yield from awaited(handle)
        self._swap_in_pull(reply)
        if self.rule.pulls == "before":
            commit, flags = self._commit, self._form_delta(self._commit.steps)
            # Where x became non-finite in later steps, this commit's were fine.
            if self.overlap and flags and not commit.flags:
                commit = commit._replace(steps=0)
            self._commit = commit._replace(clock=self.clock, flags=flags)
            reply = yield from awaited(self.end.exchange(self._commit, None))
        if reply.status == REFUSED:
            self._reset()
        else:  # the pull is adopted even where the commit was dropped
            self.rule.adopt_pull(self.x, self._buffers.sent, self._buffers.delta, self.o)
        self._commit = None
        self._obey(reply)

    def _swap_in_pull(self, reply: Reply) -> None:
        """A pull is complete: it becomes o."""
        self.o, self._buffers.pulled = self._buffers.pulled, self.o
        self.last_reply = reply
        self.pulls += 1

    def abandon(self) -> None:
        """Forget the steps done since the last exchange: if this worker leaves now, they go to the others."""
        self.held.done, self._loss = 0, 0.0

    def _reset(self) -> None:
        """The last commit was refused: x, the slots and all steps since are discarded."""
        self.x[...] = self.o
        self.abandon()  # with overlap: the steps since start again
        if self.rule.accumulates:
            self.a[...] = 0
        self._refused()

    def _refused(self) -> None:
        self.refusals += 1
        if self.optimizer is not None:
            self.state = self.optimizer.init(self.x)._replace(step=self.state.step)

    def _exchange(self) -> Waits[None]:
        """Finish the exchange under way, if any, and start the next, if it is due: the reply may be STOP or REFUSED."""
        if self._handle is not None:
            yield from self._finish_exchange()
        if not self.held.is_due:
            return
        self.start_exchange()
        if not self.overlap or not self.held.leases:
            yield from self._finish_exchange()

    def _obey(self, reply: Reply) -> None:
        """Do what the center says: stop, or go on with the lease that it grants."""
        self.checkpoint = max(self.checkpoint, reply.checkpoint)
        self._work_may_come = reply.control == WAIT
        if reply.control == STOP and self.rule.allreduce:  # no further round: with overlap, steps are dropped
            self.dropped += self.held.done
            self.abandon()
            self.held.stop()
        elif reply.control == STOP:
            self.held.stop()  # commit the steps done so far
        elif reply.work.first >= 0:
            self.held.add(reply.work, reply.period)

    # --- a session ---

    def begin(self) -> None:
        """Start from the center, whatever x was, and request work (with overlap for two periods; see `ahead`)."""
        run_waits(self.waits_to_begin())

    def waits_to_begin(self) -> Waits[None]:
        """As `begin`."""
        yield from self.waits_to_settle()
        self.x_at_leave = self.x
        request = self._request(SPARE if self.spare else 0)  # answered when it is called, or when all have left
        reply = yield from awaited(self.end.exchange(request, self._buffers.pulled))
        self._swap_in_pull(reply)
        self.spare = reply.control == UNCALLED
        if not (self.phase is Phase.RESUMED and self.rule.pulls == "before"):
            self.x[...] = self.o
        self.phase = Phase.LEFT if self.spare else Phase.TRAINING
        self.before = reply.steps if self.spare else self.before
        self._obey(reply)
        for _ in range(max(self.ahead, self.overlap) if self.held.wait else 0):
            if not self.held.leases:
                return
            reply = yield from awaited(self.end.exchange(self._request(), None))
            self._obey(reply)

    def _request(self, requests: int = 0) -> Commit:
        """A message that requests work, without a delta."""
        total = -1 if self.total is None else self.total
        return Commit(self.index, requests=WORK | requests, total=total, wanted=self.held.wanted(self.ahead))

    def waits_for_work(self) -> Waits[bool]:
        """Wait for a step to compute; false if there is none left for this worker."""
        while self.held.is_used_up:
            if self.held.leases:  # an empty lease of an Allreduce round, or one cut short by STOP
                yield from self._exchange()
            elif self._handle is not None:
                yield from self._finish_exchange()
            elif self._work_may_come:
                yield from self._wait_for_work()
            else:
                return False
        return True

    def _wait_for_work(self) -> Waits[None]:
        """Other workers hold leases that a break, a refusal or a lost rank may free: ask once, and wait."""
        reply = yield from awaited(self.end.exchange(self._request(IDLE | PULL), self._buffers.pulled))
        self._swap_in_pull(reply)
        if self.rule.pulls == "after":  # nothing was computed since the last pull
            self.x[...] = self.o
        self._obey(reply)

    def steps(self) -> Generator[int, None, None]:
        """Yield the number of each step granted to this worker; the caller then calls `step`, once.

        Begins from the center; at the end commits a partial period and leaves, with the final center in x. After
        a `break` the same, but x is the final center only after `settle`. Ends early where this rank is elected
        to serve.
        """
        try:
            self.begin()
            try:
                while run_waits(self.waits_for_work()):
                    yield self.held.number
            except GeneratorExit:
                # A break, or an exception in the caller's loop: do not wait for the others here, or its traceback would
                # appear only when they are done. `settle` waits.
                self.leave()
                raise
            self.leave()
            self.settle()
        except Elected:
            self._retire()

    def _run(self, waits: Waits[None]) -> None:
        """Run `waits` to its end, or until this rank is elected to serve."""
        try:
            run_waits(waits)
        except Elected:
            self._retire()

    def _retire(self) -> None:
        """This rank serves from now on."""
        self.phase = Phase.ELECTED
        self.abandon()
        self.held.stop()
        self._work_may_come = False
        self._handle = self._commit = None

    def stop_all(self) -> None:
        """Ask that all workers stop, after the period that each is computing; this one goes on until it leaves."""
        if self.rule.allreduce:
            return  # a rank that leaves ends the rounds of all
        self._run(self._waits_to_stop_all())

    def _waits_to_stop_all(self) -> Waits[None]:
        if self._handle is not None:
            yield from self._finish_exchange()
        yield from awaited(self.end.exchange(Commit(self.index, requests=STOP_ALL), None))

    def leave(self) -> None:
        """Finish the exchange under way, commit the steps done, and leave, without waiting for the reply.

        In a process that the caller has forked it does nothing: the connection is the parent's.
        """
        if os.getpid() != self._process:
            return
        self._run(self.waits_to_leave())

    def waits_to_leave(self) -> Waits[None]:
        """As `leave`."""
        if self.elected or self.leaving or self.spare:
            return
        if self._commit is not None and self._handle is None:
            return  # an exchange has failed: its exception is propagating, and must not be delayed
        if self._handle is not None:
            yield from self._finish_exchange()
        last: Commit | None = None
        if self.held.done and self.rule.pulls == "before":
            self.start_exchange()
            yield from self._finish_exchange()  # leaving returns the lease that it was granted
        elif self.held.done:
            self._commit = last = self._form_commit(0)
            if last.flags & NOT_FINITE:  # the reply comes when all have left, and is the others'
                self._refused()
        self.held.stop()
        self._handle = self.end.leave(last, self._buffers.pulled)
        self.phase = Phase.LEAVING

    def settle(self) -> None:
        """After leaving: wait until all workers have left, and copy the final center to x and o.

        Or until this rank is elected to serve the others.
        """
        self._run(self.waits_to_settle())

    def waits_to_settle(self) -> Waits[None]:
        """As `settle`."""
        if self.phase is not Phase.LEAVING:
            return
        assert self._handle is not None
        reply = yield from awaited(self._handle)
        self._swap_in_pull(reply)
        self.before = reply.steps
        self._handle = self._commit = None
        self.phase = Phase.LEFT
        self.x_at_leave = self.x.copy() if self.rule.pulls == "before" else self.x
        self.x[...] = self.o
