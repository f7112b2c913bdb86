"""A rank's part in the training: a center, or a block of it, to serve, or workers to drive."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array, empty_like, to_host
from ..core.backoff import wait_until
from ..core.center import Center, serve
from ..core.ends import Apply, CenterEnd, Handle, WorkerEnd
from ..core.leases import Leases, rounds, speed_proportional
from ..core.messages import Commit, Reply
from ..core.worker import Worker
from ..recovery.failover import Failover
from ..transport.sharded import ShardedWorker


class Role:
    """A rank's part: a center (or a block of it) to serve, or workers to drive (several in one process alone).

    `center`: the center's counts where they are known; `count`: number of workers; `end`: the center's end, where
    this rank has it; `others`: at rank 0, ends by which it reads the other centers' blocks; `centers`: communicator of
    the center ranks; `failover`: where the workers outlive the center.
    """

    failover: Failover | None = None
    before_leaving: Callable[[], None] | None = None  # at the first of several centers, when its workers have left

    def __init__(
        self,
        center: Center,
        workers: list[Worker],
        count: int,
        serves: bool = False,
        end: CenterEnd | None = None,
        apply: Apply | None = None,
        spans: Sequence[slice] = (),
        others: Sequence[WorkerEnd] = (),
        centers: MPI.Comm | None = None,
        whole: Array | None = None,
    ) -> None:
        self.center, self.workers, self.count, self.serves = center, workers, count, serves
        self.end, self._apply = end, apply
        self._spans, self._others, self._centers, self._whole = spans, others, centers, whole
        self._copied: list[Handle] = []  # pulls of the snapshot begun last
        self._resumed: Mapping[str, Any] | None = None
        self.first = centers is None or centers.rank == 0  # whether this center grants the work
        self.session = 0  # sessions begun; the last with these:
        self.total: int | None = None
        self.period = 1

    @property
    def span(self) -> slice:
        """The part of the center variable that this rank holds, or all."""
        return self._spans[self._centers.rank] if self._centers else slice(None)

    def resume(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Go on, in the next session, from a checkpoint: vectors of this rank's `span`, and the facts; on every rank.

        Raises ValueError if the checkpoint is of another center optimizer.
        """
        self._resumed = facts
        for worker in self.workers:
            worker.sequence = max(worker.sequence, *facts["applied"], 0)  # what is applied is told from what will be
        if self.end is not None:
            self.center.restore(arrays, facts, self.end.c)
            if hasattr(self.end, "resume"):
                stale = self.center.staleness_sum, self.center.staleness_max
                self.end.resume(self.center.clock, self.center.steps, stale, self.center.refused)
        elif self.center.rule.allreduce:
            end: Any = self.workers[0].end
            self.center.restore(arrays, facts, end.c)
            end.clock, end.steps = self.center.clock, self.center.steps

    def begin(self, total: int | None, period: int) -> None:
        """Lay out the work of a session: `total` steps over all workers (None: no end), λ = `period`; collective."""
        resumed, self._resumed = self._resumed, None
        self.session, self.total, self.period = self.session + 1, total, period
        self.center.session = self.session
        pace = None if self.center.now is None else speed_proportional(period, self.center.now)
        leases = Leases(total, period, pace)
        if resumed:
            done = int(resumed["steps"])
            leases.restore(resumed["leases"] or {"next": done, "free": [], "committed": done})
        if self.center.rule.allreduce:
            (worker,) = self.workers
            collective: Any = worker.end
            work = rounds(total, period, worker.index, self.count, leases.next, leases.free)
            collective.begin(total, work)
        elif self.end is not None and self.first and not hasattr(self.end, "begin"):
            self.center.leases = leases
        for end in self._ends():
            if not self.center.rule.allreduce and hasattr(end, "begin"):
                end.begin(total, period, leases.next)  # accumulate: a lease is a counter
        for worker in self.workers:
            worker.total, worker.session = total, self.session
        if self.end is not None and not self.serves:
            self.end.open()

    def _ends(self) -> list[Any]:
        """All ends of this rank, in the order in which the centers come."""
        mine: list[Any] = [] if self.end is None else [self.end]
        for worker in self.workers:
            end: Any = worker.end
            mine += end.ends if isinstance(end, ShardedWorker) else [end]
        return mine + list(self._others)

    def apply(self, commit: Commit, c: Array) -> Reply:
        """What a message does at this center."""
        assert self._apply is not None
        return self._apply(commit, c)

    def serve(self, on_turn: Callable[[], None] | None = None) -> None:
        """Serve the workers until all have left, and share the final center among center ranks; on these only."""
        assert self.end is not None
        assert self._apply is not None
        serve(self.end, self._apply, on_turn)
        if self._whole is None or self._centers is None:
            return
        if self.first:
            # Before the farewells: what comes for one would else be taken for another.
            if self.before_leaving is not None:
                self.before_leaving()
            for handle in self._copied:
                handle.wait()
            farewells = [end.leave(None, self._whole[span]) for end, span in zip(self._others, self._spans[1:])]
            for farewell in farewells:
                farewell.wait()
            self._whole[self._spans[0]] = to_host(self.end.c)
        wait_until(self._centers.Ibcast(self._whole, 0).Test)

    @property
    def centers(self) -> MPI.Comm | None:
        """Communicator of the center ranks, if there are several."""
        return self._centers

    def copy_center(self) -> Callable[[], Array | None]:
        """Begin to copy the center variable; call what is returned, now and then, until it gives the copy (n,)."""
        if self._whole is None:
            copy = to_host(self.c).copy()
            return lambda: copy
        whole: Array = empty_like(self._whole)
        assert self.end is not None
        whole[self._spans[0]] = to_host(self.end.c)
        self._copied = handles = [end.pull(whole[span]) for end, span in zip(self._others, self._spans[1:])]
        return lambda: whole if sum([handle.test() for handle in handles]) == len(handles) else None

    @property
    def c(self) -> Array:
        """(n,) the center variable, where this rank holds it whole; else as last pulled, or after the session."""
        if self._whole is not None:
            return self._whole
        if self.end is not None:
            return self.end.c
        end: Any = self.workers[0].end
        c: Array = getattr(end, "c", self.workers[0].o)
        return c

    def close(self) -> None:
        """Free what the ends hold; collective."""
        for end in self._ends():
            end.close()
        if self._centers is not None:
            self._centers.Free()
