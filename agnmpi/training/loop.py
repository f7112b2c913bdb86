"""A loop of your own over the steps: on its rank it trains or serves, however it ends, and whoever is lost."""

import logging
import operator
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mpi4py import MPI

from ..arrays.backend import Array, Range, bring
from ..cluster.roles import CenterRole, HoldingRole, NodeRole
from ..cluster.setup import Setup
from ..core.backoff import wait_until
from ..core.center import PATIENCE
from ..core.leases import Lease
from ..core.messages import CONTINUE, STOP, Commit, Reply
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.params import Layout
from ..core.rules import Rule
from ..core.worker import Phase, Worker
from ..recovery.center_state import Saved
from ..recovery.checkpoint import newest, read_caller, read_span
from ..recovery.restore import resume
from ..reporting.events import RecentMean
from ..transport.agreement import allgather, format_ranks
from .abort import abort
from .evaluations import AtCenter, Point
from .exits import Interrupted, Signals
from .own_checkpoints import OwnCheckpoints
from .session import Session

WAIT = 30.0  # seconds after which a rank that waits for others to begin says so, once a session


class Caller(NamedTuple):
    """What a loop calls in the program that it belongs to."""

    pack: Callable[[], None]  # before x is read: copy arrays of the caller's own into it
    pulled: Callable[[], None]  # x has become a pulled center, or the final one
    refused: Callable[[], None]  # then, if this worker's commit was refused
    state: Callable[[], Mapping[str, Array]]  # a worker's arrays that checkpoints hold, beside its own
    restore: Callable[[Mapping[str, Array]], object]  # called with the same, when resumed


class Kept(NamedTuple):
    """Where checkpoints are kept."""

    directory: Path
    every: float  # seconds between two


class Asked(NamedTuple):
    """A session that the caller asks for."""

    total: int | None  # steps over all workers
    at_center: Callable[[Point, Array], object] | None  # called where the center is
    every: float  # steps between two calls
    ahead: int = 0  # leases that a worker holds beyond the one that it computes


class Loop(Observer):
    """The sessions of a program with its own loop, on one rank.

    Args:
        comm: ours (duplicated); its ranks take part.
        rule: of exchange.
        x: (n,) the parameters of this rank.
        optimizer: of the workers; None if the caller moves x.
        center_optimizer: None adds.
        setup: how they exchange.
        period: λ.
        name: of the optimizer, in messages.
        caller: what the caller does meanwhile.
        layout: of the parameters.
        kept: where checkpoints are kept; None: nowhere, and signals are the caller's.
    """

    def __init__(
        self, comm: MPI.Intracomm, rule: Rule, x: Array, optimizer: Optimizer | None,
        center_optimizer: Optimizer | None, setup: Setup, period: int, name: str, caller: Caller,
        layout: Layout, kept: Kept | None,
    ) -> None:  # fmt: skip
        self._layout = layout
        saved = partial(_newest, kept, self._say)
        self.session = Session(comm, rule, x, optimizer, center_optimizer, setup, self, saved)
        self.closed = self._running = self._stepped = False
        self._x, self._period, self._name, self._caller = x, period, name, caller
        if self.worker is not None:
            self.worker.form_x, self.worker.more = self._form_x, caller.state
        self._generators: weakref.WeakSet[Generator[int, None, None]] = weakref.WeakSet()
        self._pulls = self._refusals = 0  # of the worker, when the caller was last told
        self._failed = 0  # its commits that were refused in a row
        self._asked: Asked | None = None  # by a call of `steps` whose generator was not begun
        self._met = set[int]()  # workers that have begun this session
        self._stopping = False  # with an allreduce rule: this rank leaves after its step
        self._loss = RecentMean(10.0 * period * self.session.role.count)
        self._began = time.monotonic(), 0  # this session, and the steps before it
        self._at_center: AtCenter | None = None
        self._kept, self._checkpoints = kept, None if kept is None else self._set_up_checkpoints(kept)
        self._skip = 0  # loops that were complete when the run was resumed
        self._done_before = 0  # steps of the next session that were taken or given up before the run was resumed
        self._saved_at = -1  # steps at the last `save`
        self._signals = Signals(partial(abort, comm)) if kept else None

    @property
    def worker(self) -> Worker | None:
        """The worker of this rank; None where it serves."""
        role = self.session.role
        return None if role.serves else role.workers[0]

    def steps(self, asked: Asked) -> Generator[int, None, None]:
        """Yield the steps of a session, as `AGNOptimizer.steps` says."""
        generator, self._asked = self._steps(asked), asked
        self._generators.add(generator)
        return generator

    def stop(self) -> None:
        """End this session for all: each worker stops after the period that it computes."""
        rule, total = self.session.rule, self.session.role.total
        if rule.allreduce and total is not None:
            raise RuntimeError(
                f"{self._name}: rule {rule.name} gives {total} steps to all ranks at the same time: to stop early, "
                "loop over steps() without a number"
            )
        self._stop_all()

    def _stop_all(self) -> None:
        role = self.session.role
        if self.session.rule.allreduce:
            self._stopping = True
        elif isinstance(role, HoldingRole):
            role.center.control = STOP
        elif self._running:
            role.workers[0].stop_all()

    def save(self, directory: Path) -> None:
        """Write a checkpoint; collective, between two sessions."""
        if self._running:
            raise RuntimeError(f"{self._name}: save between two loops, not in one: rank 0 must take part")
        self.finish()
        self._save(directory, between=True)

    def restore(self, directory: Path, required: bool) -> None:
        """Continue from the newest checkpoint; collective, before the first session."""
        session, role = self.session, self.session.role
        if role.session:
            raise RuntimeError(f"{self._name}: restore before the first loop")
        run = (lambda: directory) if session.comm.rank == 0 else None
        facts = resume(session.comm, role, self._layout, None, {}, run, required, self._say)
        if facts is None:
            return
        checkpoint = Path(facts["checkpoint"])
        self._skip = role.session = int(facts.get("completed", 0))
        before = int(facts.get("before", 0))
        if not facts.get("between"):
            self._done_before = int(facts["steps"]) - before + int((facts["leases"] or {}).get("given_up", 0))
        for worker in role.workers:
            worker.before = before
        if self.worker is not None and self.worker.phase is Phase.RESUMED:
            self._caller.restore(read_caller(checkpoint, self.worker.index))
        if role.serves and role.stores:
            self._x[...] = bring(read_span(checkpoint, facts, slice(None))["c"], self._x)
        self._caller.pulled()

    def _save(self, directory: Path, between: bool) -> None:
        comm = self.session.comm
        if self._checkpoints is not None:
            self._checkpoints.finish()
        steps = int(allgather(comm, str(self.session.role.center.steps))[0])
        OwnCheckpoints(directory, self.session, self._layout, partial(self._facts, between), self._say).save(steps)
        wait_until(comm.Ibarrier().Test)
        self._saved_at = steps
        self._checkpoints = None if self._kept is None else self._set_up_checkpoints(self._kept)

    def _set_up_checkpoints(self, kept: Kept) -> OwnCheckpoints:
        facts = partial(self._facts, False)
        return OwnCheckpoints(kept.directory, self.session, self._layout, facts, self._say, kept.every)

    def _facts(self, between: bool) -> dict[str, Any]:
        """Of this loop, for a checkpoint; `between`: two sessions."""
        role, (began, before) = self.session.role, self._began
        return {
            "samples": role.center.steps,
            "seconds": time.monotonic() - began,
            "completed": role.session - (not between),
            "before": role.center.steps if between else before,
            "between": between,
        }

    def _end_if_signalled(self) -> None:
        """Raise Interrupted on all ranks, after a checkpoint, if any was asked to stop."""
        if self._signals is None or self._kept is None:
            return
        received = [text for text in allgather(self.session.comm, self._signals.received or "") if text]
        if received:
            self._save(self._kept.directory, between=False)
            raise Interrupted(abort=False)

    @contextmanager
    def _signals_installed(self) -> Iterator[None]:
        signals = self._signals if threading.current_thread() is threading.main_thread() else None
        if signals is not None:
            signals.install()
        try:
            yield
        finally:
            if signals is not None:
                signals.remove()

    def _say(self, line: str) -> None:
        """Warn, or log what is no warning."""
        text = line.removeprefix("WARNING: ")
        if text != line:
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)
        else:
            logging.getLogger("agnmpi").info("%s: %s", self._name, text)

    @property
    def point(self) -> Point:
        """Steps and commits so far as this rank knows them, and the recent mean loss: at a worker its own."""
        role = self.session.role
        if isinstance(role, HoldingRole):
            return Point(role.center.steps, role.center.clock, self._loss.value)
        reply = role.workers[0].last_reply or Reply(0)
        return Point(reply.steps, reply.clock, self._loss.value)

    @property
    def steps_per_second(self) -> float:
        """Of all workers, in this session, as this rank knows it."""
        since, before = self._began
        return (self.point.steps - before) / max(time.monotonic() - since, 1e-9)

    def check(self) -> Worker:
        """Return the worker, if it is to take a step now; raises RuntimeError where it is not."""
        worker = self.worker
        if worker is None:
            raise RuntimeError(
                f"rank {self.session.rank} holds the center and takes no steps: call this inside "
                f"`for step in {self._name}.steps(n)`, which serves here"
            )
        if not self._running:
            raise RuntimeError(f"{self._name}: steps are taken inside `for step in opt.steps(n)`, which is not running")
        if self._stepped:
            raise RuntimeError(f"{self._name}: one step in each iteration of the loop over steps(), not two")
        return worker

    def step(self, g: Array | None, loss: float, ranges: Sequence[Range] | None = None) -> None:
        """Let the worker take its current step; see `Worker.step`."""
        self.check().step(g, loss, ranges)
        if not isinstance(self.session.role, HoldingRole):
            self._loss.add(loss, 1)
        self._stepped = True
        self.refresh()

    def skip(self) -> None:
        """Let this turn of the loop go by without a step."""
        self.check()
        self._stepped = True

    def finish(self) -> None:
        """After a break: wait for the others, and take the final center.

        As after a loop that was never begun, such as over zip(loader, steps) with an empty loader: the others wait.
        """
        if self._asked is not None and not self._running:
            with closing(self._steps(self._asked)) as steps:
                next(steps, None)
        worker = self.worker
        if worker is not None and not self._running and (worker.leaving or worker.elected):
            self._finish(worker)

    def refresh(self) -> None:
        """Tell the caller if a center was pulled since, and if this worker's commit was refused."""
        if (worker := self.worker) is None or worker.pulls == self._pulls:
            return
        refused = worker.refusals > self._refusals
        self._pulls, self._refusals = worker.pulls, worker.refusals
        self._failed = self._failed + 1 if refused else 0
        if self._failed == PATIENCE and not self.session.single_commits:  # no center sees its commits
            self._warn_of_failing(self.session.rank, self._failed, "It leaves")
        self._caller.pulled()
        if refused:
            self._caller.refused()

    def _form_x(self) -> None:
        self.refresh()  # with overlap a pull may have moved x since
        try:
            self._caller.pack()
        except (TypeError, ValueError):
            if self.worker is not None:
                self.worker.abandon()
            raise

    def end(self) -> None:
        """Leave a loop whose generator is still referenced after a break, or a hook that was not ended; for good."""
        for generator in list(self._generators):
            generator.close()
        self.finish()
        session = self.session
        if self._kept is not None and session.role.session and not session.members.lost:
            steps = int(allgather(session.comm, str(session.role.center.steps))[0])
            if steps != self._saved_at:
                self._save(self._kept.directory, between=True)
        if self._checkpoints is not None:
            self._checkpoints.finish()
        self.closed = True

    def _finish(self, worker: Worker) -> None:
        self.session.finish(worker)
        self._copy_final_center()

    def _copy_final_center(self) -> None:
        """Where this rank serves, no worker does this."""
        if self.session.role.serves:
            self._x[...] = bring(self.session.role.c, self._x)
            self._caller.pulled()
        self.refresh()

    def _steps(self, asked: Asked) -> Generator[int, None, None]:
        self._asked, total = None, asked.total
        if self._skip:
            self._skip -= 1
            return
        if self.closed:
            raise RuntimeError(f"{self._name} is closed")
        if self._running:
            raise RuntimeError(f"{self._name}: one loop over steps() at a time")
        total = None if total is None else operator.index(total)
        if total is not None and total < 0:
            raise ValueError(f"the number of steps must not be negative, but is {total}")
        self.finish()
        before, self._done_before = self.session.role.center.settled - self._done_before, 0
        with self._watch(), self._signals_installed():
            self._begin(asked)
            dropped = 0
            for workers in self.session.rounds():
                for worker in workers:
                    worker.dropped = 0
                    yield from self._train(worker)
                    dropped += worker.dropped
        if self._at_center is not None:
            self._at_center.settle()
        if self.session.deserted:
            raise RuntimeError(f"{self._name}: all workers are lost")
        self._copy_final_center()
        self._end_if_signalled()
        self._report(total, self.session.role.center.settled - before, dropped)

    def _begin(self, asked: Asked) -> None:
        session, role = self.session, self.session.role
        self._stopping, role.center.control = False, CONTINUE
        self._met.clear()
        if session.comm.rank == 0:
            self._caller.pack()
        role.start_from(self._x)
        for worker in role.workers:
            worker.ahead = asked.ahead
        session.begin(asked.total, self._period)
        if role.serves and not session.single_commits:
            self._met.update(range(role.count))  # that was collective
        self._began = time.monotonic(), self.point.steps
        self._at_center = None
        if asked.at_center is not None and session.comm.rank == 0:
            self._at_center = AtCenter(role, asked.every, asked.at_center, self._failed_at_center)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """While in it: say once if others, after `WAIT` seconds, have not begun."""
        timer = threading.Timer(WAIT, self._say_who_is_missing, [self.worker.pulls if self.worker else 0])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _say_who_is_missing(self, pulls: int) -> None:
        session, role = self.session, self.session.role
        if role.serves:
            says = not session.rank or isinstance(role, NodeRole)
            late = [session.members.rank_of(worker) for worker in role.numbers if worker not in self._met]
            who = f"{format_ranks(late)} {'are' if len(late) > 1 else 'is'} not" if late and says else ""
        elif role.workers[0].pulls > pulls:
            who = ""
        else:
            who = "not every rank is" if session.rule.allreduce else f"rank {session.members.serving[0]} is not"
        if who:
            text = f"rank {session.rank} has waited for {WAIT:g} s: {who} in steps(): every rank must run the loop"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def _failed_at_center(self, error: str) -> None:
        warnings.warn(
            f"{self._name}: at_center has failed, and training goes on:\n{error}", RuntimeWarning, stacklevel=2
        )

    def _report(self, total: int | None, taken: int, dropped: int) -> None:
        """Warn, at the end of a loop, of steps that were not taken."""
        role, rank = self.session.role, self.session.rank
        short = total is not None and taken < total and role.center.control != STOP
        if role.serves and rank == 0 and short:
            text = f"{taken} of {total} steps were taken: the workers left before the end"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=3)
        if self.session.rule.allreduce and short:
            raise RuntimeError(
                f"{self._name}: another rank left the loop after {taken} of {total} steps, by break or "
                f"by an exception, and rule {self.session.rule.name} needs all ranks; use steps() to end early"
            )
        if dropped:
            text = f"{dropped} steps of rank {rank} were dropped: another rank broke off meanwhile"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=3)

    def _train(self, worker: Worker) -> Generator[int, None, None]:
        """A worker's steps in a loop."""
        self._running, told = True, False
        try:
            # However it ends, commit the partial period and leave: a caught error may keep this frame alive.
            with closing(worker.steps()) as steps:
                for number in steps:
                    self.refresh()
                    self._stepped = False
                    yield number
                    if not self._stepped:
                        raise RuntimeError(
                            f"step {number} was not taken: the loop over {self._name}.steps() must call minimize(), "
                            "apply_gradients() or step() once, or skip()"
                        )
                    if self._checkpoints is not None:
                        self._checkpoints.stepped()
                    if self._signals is not None and self._signals.received and not told:
                        told = True
                        self._stop_all()
                    if self._stopping:
                        break
            if self._stopping:  # all stop now: none waits for long
                worker.settle()
        except GeneratorExit:  # break
            if self.session.role.serves:  # it was elected as it left: the others wait
                self._finish(worker)
            raise
        finally:
            self._running = self._stepped = False

    def committed(self, commit: Commit, c: Array) -> None:
        """Count, and call the caller's `at_center`."""
        self._loss.add(commit.loss, commit.steps)
        if self._checkpoints is not None:
            self._checkpoints.committed(c)
        if self._at_center is not None:
            self._at_center.committed(c, self.point, last=False)
            self._at_center.tick()

    def served(self, commit: Commit, _reply: Reply) -> None:
        """This worker has begun."""
        self._met.add(commit.worker)

    def waiting(self) -> None:
        """Go on with `at_center`; tell the workers if they are to stop."""
        role = self.session.role
        if self._at_center is not None:
            self._at_center.tick()
        if self._checkpoints is not None:
            self._checkpoints.waiting()
        if self._signals is not None and self._signals.received:
            role.center.control = STOP
        if isinstance(role, CenterRole):
            role.end.announce(role.center.control, role.center.checkpoint)

    def lost(self, rank: int, _held: Sequence[Lease]) -> None:
        """Warn."""
        self._warn_of_loss(f"rank {rank} is lost; what it had not committed goes to the others")

    def given_up(self, lease: Lease) -> None:
        """Warn."""
        last = lease.first + lease.steps - 1
        text = f"the commits of steps {lease.first} to {last} were refused repeatedly: they are given up"
        warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def failing(self, worker: int, refusals: int) -> None:
        """Warn."""
        session = self.session
        rank = session.members.rank_of(worker) if session.role.serves else session.rank
        self._warn_of_failing(rank, refusals, "It tries again")

    def _warn_of_failing(self, rank: int, refusals: int, then: str) -> None:
        text = (
            f"the last {refusals} commits of rank {rank} were refused: NaN or infinity. {then}, and the others "
            "go on; if moments of its optimizer are not finite, set them to 0 in on_refused"
        )
        warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def new_center(self, source: str, _newly_lost: Sequence[int]) -> None:
        """Warn; on every rank."""
        change = f"ranks {sorted(self.session.members.lost)} are lost, the center among them"
        if self._kept is not None:
            self._checkpoints = self._set_up_checkpoints(self._kept)
        if self.session.comm.rank == 0:
            change += f"; this rank {'serves' if self.session.role.serves else 'trains'} on, from {source}"
        self._warn_of_loss(change)

    def _warn_of_loss(self, change: str) -> None:
        text = (
            f"{self._name}: {change}. MPI cannot be finalized any more (Open MPI 5.0 hangs there): when all is done, "
            "end each rank by os._exit, after a barrier on the `comm` of this optimizer"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _newest(kept: Kept | None, say: Callable[[str], None]) -> Saved | None:
    checkpoint = None if kept is None else newest(kept.directory, say)
    return checkpoint and checkpoint[1:]


class Hook:
    """Callbacks for a training loop: begin, after each step, end.

    >>> def loop(step, hook):
    ...     hook.begin()  # on a center rank: serves until the workers are done
    ...     while not hook.should_stop():
    ...         step()
    ...         hook.after_step()
    ...     hook.end()
    """

    def __init__(self, steps: Generator[int, None, None]) -> None:
        self._steps = steps
        self.step_number: int | None = None

    def begin(self) -> None:
        """Start from the center."""
        self.step_number = next(self._steps, None)

    def after_step(self) -> None:
        """Call it after each `minimize`, `apply_gradients` or `step`."""
        self.step_number = next(self._steps, None)

    def should_stop(self) -> bool:
        """Whether no step is left for this rank."""
        return self.step_number is None

    def end(self) -> None:
        """Commit the steps done, and leave."""
        self.step_number = None
        self._steps.close()
