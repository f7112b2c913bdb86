"""A loop of your own over the steps: on its rank it trains or serves, however it ends, and whoever is lost."""

import operator
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array, Range, bring
from ..cluster.roles import CenterRole, HoldingRole
from ..cluster.setup import Setup
from ..core.center import PATIENCE
from ..core.messages import CONTINUE, STOP, WORK, Commit, Reply
from ..core.optimizers import Optimizer
from ..core.params import Layout
from ..core.rules import Rule
from ..core.worker import Worker
from ..recovery.checkpoint import newest_state
from ..recovery.saver import state_bytes
from ..reporting.events import RecentMean
from ..training.evaluations import AtCenter, Point
from ..training.exits import Interrupted
from ..training.session import Session
from .keeper import Keeper
from .monitoring import LoopMonitor
from .terms import Asked, Caller, Kept
from .warner import Warner


class Loop(Warner):
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
        monitor: shows and writes it, if anything does.
    """

    def __init__(
        self, comm: MPI.Intracomm, rule: Rule, x: Array, optimizer: Optimizer | None,
        center_optimizer: Optimizer | None, setup: Setup, period: int, name: str, caller: Caller,
        layout: Layout, kept: Kept | None, monitor: LoopMonitor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name)
        saved = (lambda: newest_state(kept.directory, self._say)) if kept else lambda: None
        self.session = Session(comm, rule, x, optimizer, center_optimizer, setup, self, saved)
        self.closed = self._running = self._stepped = False
        self._x, self._period, self._caller = x, period, caller
        if self.worker is not None:
            self.worker.form_x, self.worker.more = self._form_x, caller.state
        self._generators: weakref.WeakSet[Generator[int, None, None]] = weakref.WeakSet()
        self._pulls = self._refusals = 0  # of the worker, when the caller was last told
        self._failed = 0  # its commits that were refused in a row
        self._asked: Asked | None = None  # by a call of `steps` whose generator was not begun
        self._stopping = False  # with an allreduce rule: this rank leaves after its step
        self._loss = RecentMean(10.0 * period * self.session.role.count)
        self._began = time.monotonic(), 0  # this session, and the steps before it
        self._at_center: AtCenter | None = None
        self._keeper = Keeper(self.session, layout, kept, self._facts, self._say, state_bytes(x.nbytes, optimizer))
        self._monitor = monitor
        if monitor is not None:
            monitor.session = self.session

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
        if not self._keeper.within:
            self._keeper.save(directory, between=True)

    def restore(self, directory: Path, required: bool) -> None:
        """Continue from the newest checkpoint; collective, before the first session."""
        if self.session.role.session:
            raise RuntimeError(f"{self._name}: restore before the first loop")
        facts = self._keeper.restore(directory, required, self._x, self._caller)
        if facts is not None and self._monitor is not None:
            self._monitor.resumed(facts)

    def _facts(self, between: bool) -> dict[str, Any]:
        """Of this loop, for a checkpoint; `between`: two sessions."""
        return {
            "samples": self.session.role.center.steps,
            "seconds": time.monotonic() - self._began[0],
            **({"tensors": list(self._caller.tensors.items())} if self._caller.tensors else {}),
            **self._keeper.progress(between),
            **(self._monitor.facts if self._monitor else {}),
        }

    @property
    def taken(self) -> int:
        """Steps in all commits so far, as this rank knows it.

        While a resumed run goes through the loops that were complete: so many as were taken up to there.
        """
        replayed = self._keeper.replayed
        return self.point.steps if replayed is None else replayed

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
        self._keeper.finish()
        if self._monitor is not None:
            self._monitor.finish()
        self.closed = True

    def _finish(self, worker: Worker) -> None:
        self.session.finish(worker)
        self._end_session()

    def _end_session(self) -> None:
        """All have left, each in its way; collective."""
        if self._monitor is not None:
            self._monitor.settle()
        self._copy_final_center()
        try:
            self._keeper.end_if_asked()
        except (Interrupted, RuntimeError) as error:
            if self._monitor is not None:
                self._monitor.ended_early(self._keeper.signal if isinstance(error, Interrupted) else None)
            raise
        if self._monitor is not None:
            self._monitor.ends()

    def _copy_final_center(self) -> None:
        """Where this rank serves, no worker does this."""
        if self.session.role.serves:
            self._x[...] = bring(self.session.role.c, self._x)
            self._caller.pulled()
        self.refresh()

    def _steps(self, asked: Asked) -> Generator[int, None, None]:
        self._asked, total = None, asked.total
        if self._keeper.skip:
            self._keeper.skip -= 1
            if not self._keeper.goes_on(total):
                return
        if self.closed:
            raise RuntimeError(f"{self._name} is closed")
        if self._running:
            raise RuntimeError(f"{self._name}: one loop over steps() at a time")
        total = None if total is None else operator.index(total)
        if total is not None and total < 0:
            raise ValueError(f"the number of steps must not be negative, but is {total}")
        self.finish()
        before = self.session.role.center.settled - self._keeper.done_before
        self._keeper.done_before = 0
        monitor = self._monitor
        if monitor is not None and monitor.stopped:
            return
        with self._watch(), self._keeper.signals_installed():
            self._begin(asked)
            if monitor is not None:
                monitor.begins(total, before)
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
        settled = self.session.role.center.settled - before
        self._keeper.ended(total, settled)
        self._end_session()
        self._report(total, settled, dropped)

    def _begin(self, asked: Asked) -> None:
        session, role = self.session, self.session.role
        self._stopping, role.center.control = False, CONTINUE
        self._met.clear()
        if session.comm.rank == 0:
            self._caller.pack()
        role.start_from(self._x)
        for worker in role.workers:
            worker.ahead = asked.ahead
        self._keeper.begins(self.point.steps)
        session.begin(asked.total, self._period)
        if role.serves and not session.single_commits:
            self._met.update(role.numbers)  # that was collective
        self._began = time.monotonic(), self.point.steps
        self._at_center = None
        if asked.at_center is not None and session.comm.rank == 0:
            self._at_center = AtCenter(role, asked.every, asked.at_center, self._failed_at_center)

    def _train(self, worker: Worker) -> Generator[int, None, None]:
        """A worker's steps in a loop."""
        self._running, told = True, False
        try:
            # However it ends, commit the partial period and leave: a caught error may keep this frame alive.
            quiet = self._monitor.above_bar() if self._monitor is not None else nullcontext()
            with closing(worker.steps()) as steps, quiet:
                for number in steps:
                    self.refresh()
                    self._stepped = False
                    yield number
                    if not self._stepped:
                        raise RuntimeError(
                            f"step {number} was not taken: the loop over {self._name}.steps() must call minimize(), "
                            "apply_gradients() or step() once, or skip()"
                        )
                    self._keeper.stepped()
                    if not told and (self._keeper.signalled or (self._monitor is not None and self._monitor.tick())):
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
        if self._monitor is not None:  # counts first: what is saved then holds
            self._monitor.committed(commit, c)
        if commit.requests & WORK or commit.steps >= self._period:
            self._keeper.committed(c)  # else it has left, perhaps by an exception: no checkpoint has a part of a period
        if self._at_center is not None:
            self._at_center.committed(c, self.point, last=False)
            self._at_center.tick()

    def diverged(self, error: RuntimeError) -> None:
        """End the session in order, where checkpoints are kept."""
        self._keeper.fails(error)

    def waiting(self) -> None:
        """Go on with `at_center`; tell the workers if they are to stop."""
        role = self.session.role
        if self._at_center is not None:
            self._at_center.tick()
        self._keeper.waiting()
        super().waiting()
        if (self._monitor is not None and self._monitor.tick()) or self._keeper.signalled:
            role.center.control = STOP
        if isinstance(role, CenterRole):
            role.end.announce(role.center.control, role.center.checkpoint)

    def alone(self) -> None:
        """No other rank is left."""
        if self._monitor is not None:
            self._monitor.alone()

    def _note(self, event: str, **facts: Any) -> None:
        if self._monitor is not None:
            self._monitor.note(event, **facts)

    def new_center(self, source: str, newly_lost: Sequence[int]) -> None:
        """Keep it as its new part asks for, and warn; on every rank."""
        self._keeper.new_center()
        if self._monitor is not None:
            self._monitor.new_center(source)
        super().new_center(source, newly_lost)
