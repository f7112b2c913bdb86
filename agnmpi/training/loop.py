"""A loop of your own over the steps: on its rank it trains or serves, however it ends, and whoever is lost."""

import operator
import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from ..arrays.backend import Array, bring
from ..cluster.roles import Role
from ..core.leases import Lease
from ..core.optimizers import Range
from ..core.worker import Worker


class Loop:
    """The sessions of a code with a loop of its own, on one rank.

    `role`: the part of this rank, whose `rank` is of the communicator that all began with; `x`: (n,) its
    parameters; `period`: λ; `name`: of the optimizer, for what is said; `moved()` is called when x has become a center
    that was pulled, or the final one.
    """

    def __init__(self, role: Role, rank: int, x: Array, period: int, name: str, moved: Callable[[], None]) -> None:
        self.role = role
        self.worker = None if role.serves else role.workers[0]
        self.closed = self._running = self._stepped = False
        self._rank, self._x, self._period, self._name, self._moved = rank, x, period, name, moved
        self._generators: weakref.WeakSet[Generator[int, None, None]] = weakref.WeakSet()
        self._pulls = 0  # of the worker, when `moved` was last called
        role.center.on_given_up = self._given_up
        if role.failover is not None:
            role.failover.on_center = self._new_center
            if self.worker is None:
                end: Any = role.end
                end.on_loss = self._lose

    def steps(self, total: int | None) -> Generator[int, None, None]:
        """Yield the steps of a session, as `AGNOptimizer.steps` says."""
        generator = self._steps(total)
        self._generators.add(generator)
        return generator

    def check(self) -> Worker:
        """Return the worker, if it is to take a step now; raises RuntimeError where it is not."""
        if self.worker is None:
            raise RuntimeError(
                f"rank {self._rank} holds the center and takes no steps: call this inside "
                f"`for step in {self._name}.steps(n)`, which serves here"
            )
        if not self._running:
            raise RuntimeError(f"{self._name}: steps are taken inside `for step in opt.steps(n)`, which is not running")
        if self._stepped:
            raise RuntimeError(f"{self._name}: one step in each turn of the loop over steps(), not two")
        return self.worker

    def step(self, g: Array | None, loss: float, ranges: Sequence[Range] | None = None) -> None:
        """Let the worker take the step that it is at; see `Worker.step`."""
        self.check().step(g, loss, ranges)
        self._stepped = True

    def settle(self) -> None:
        """After a break: wait for the others, and take the final center."""
        worker = self.worker
        if worker is None or self._running:
            return
        leaving = worker.leaving
        worker.settle()
        if worker.elected:
            self._serve()
        elif leaving:
            self._regroup()
        self.refresh()

    def refresh(self) -> None:
        """Call `moved` if a center was pulled since."""
        if self.worker and self.worker.pulls != self._pulls:
            self._pulls = self.worker.pulls
            self._moved()

    def end(self) -> None:
        """Leave a loop that was broken off but is still held by a name, or a hook that was not ended; for good."""
        for generator in list(self._generators):
            generator.close()
        self.settle()
        self.closed = True

    def _steps(self, total: int | None) -> Generator[int, None, None]:
        if self.closed:
            raise RuntimeError(f"{self._name} is closed")
        if self._running:
            raise RuntimeError(f"{self._name}: one loop over steps() at a time")
        total = None if total is None else operator.index(total)
        if total is not None and total < 0:
            raise ValueError(f"the number of steps must not be negative, but is {total}")
        self.settle()
        center = self.role.center
        before = center.settled
        self.role.begin(total, self._period)
        if self.worker is None:
            self._serve()
            if total is not None and center.settled - before < total and self._rank == 0:
                short = f"{center.settled - before} of {total} steps were taken: the workers left before the end"
                warnings.warn(f"{self._name}: {short}", RuntimeWarning, stacklevel=2)
            return
        worker = self.worker
        worker.dropped = 0
        while True:
            yield from self._train(worker)
            if not worker.elected:
                break
            if self._serve():
                return
            self.worker = worker  # it has lost all its workers, and trains on alone
        self._regroup()
        self.refresh()
        if center.rule.allreduce and total is not None and center.settled - before < total:
            raise RuntimeError(
                f"{self._name}: another rank left the loop after {center.settled - before} of {total} steps, by break "
                f"or by an exception, and rule {center.rule.name} needs all ranks; use steps() to end early"
            )
        if worker.dropped:
            short = f"{worker.dropped} steps of rank {self._rank} were dropped: another rank broke off meanwhile"
            warnings.warn(f"{self._name}: {short}", RuntimeWarning, stacklevel=2)
            worker.dropped = 0

    def _train(self, worker: Worker) -> Generator[int, None, None]:
        """The part of a worker in a loop."""
        self._running = True
        try:
            # However it ends, commit the partial period and leave: who catches an error may keep this frame alive.
            with closing(worker.steps()) as steps:
                for number in steps:
                    self.refresh()
                    self._stepped = False
                    yield number
                    if not self._stepped:
                        raise RuntimeError(
                            f"step {number} was not taken: the loop over {self._name}.steps() must call minimize(), "
                            "apply_gradients() or step() once"
                        )
        except GeneratorExit:  # break
            if worker.elected:
                self._serve()
            raise
        finally:
            self._running = self._stepped = False

    def _serve(self) -> bool:
        """At a center, or at a worker that was elected in place of a lost one: serve until all have left.

        False if all its workers were lost, and it was one itself: it can go on alone.
        """
        self.worker = None
        self.role.serve()
        end: Any = self.role.end
        deserted = self.role.failover is not None and end.deserted
        self._regroup()
        if deserted and self.role.failover is not None and self.role.failover.worker is not None:
            self.role.failover.alone()
            return False
        if deserted:
            raise RuntimeError(f"{self._name}: all workers are lost")
        self._x[...] = bring(self.role.c, self._x)
        self._moved()
        return True

    def _regroup(self) -> None:
        """After a loop: find out who is left, if ranks may be lost."""
        failover = self.role.failover
        while failover is not None and failover.regroup():  # the center was lost at the very end
            if self.worker is not None and not self.role.serves:
                self.worker.leave()
                self.worker.settle()
            if self.role.serves:
                self.worker = None
                self.role.serve()

    def _new_center(self) -> None:
        failover = self.role.failover
        assert failover is not None
        what = f"ranks {failover.lost} are lost, the center among them"
        if failover.comm.rank == 0:
            taken: Any = failover.role
            self.role = taken
            taken.center.on_given_up = self._given_up
            if taken.serves:
                taken.end.on_loss = self._lose
            what += f"; this rank {'serves' if taken.serves else 'trains'} on, from {failover.source}"
        self._warn_of_loss(what)

    def _lose(self, worker: int) -> None:
        self.role.center.worker_lost(worker)
        failover = self.role.failover
        assert failover is not None
        self._warn_of_loss(f"rank {failover.served[worker + 1]} is lost; what it had not committed goes to the others")

    def _given_up(self, lease: Lease) -> None:
        text = (
            f"{self._name}: steps {lease.first} to {lease.first + lease.steps - 1} gave NaN or infinity again and "
            "again, and are given up"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _warn_of_loss(self, what: str) -> None:
        text = (
            f"{self._name}: {what}. MPI cannot be finalized any more (Open MPI 5.0 hangs there): when all is done, end "
            "each rank by os._exit, after a barrier on the `comm` of this optimizer"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
