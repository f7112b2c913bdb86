"""A rank's part in training: set up, begin, train or serve, continue without lost ranks, end.

Used by `AGNOptimizer` and `agnmpi train` alike.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mpi4py import MPI

from ..arrays.backend import Array
from ..arrays.kernels import set_threads
from ..cluster.connect import Connector
from ..cluster.role import Role
from ..cluster.roles import CenterRole
from ..cluster.setup import Setup, outlives_loss
from ..core.leases import Lease
from ..core.membership import Membership
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..core.worker import Worker
from ..recovery.center_state import Saved
from ..recovery.failover import Failover
from ..recovery.silent_workers import leave_behind
from ..recovery.watchdog import watch


class Session:
    """The sessions of one rank; collective over `comm`, which must be ours (duplicated).

    Args:
        comm: ranks that take part.
        rule: of exchange.
        x: (n,) parameters of this rank, moved in place; rank 0's are the center's.
        optimizer: of the workers; None if the caller moves x.
        center_optimizer: None adds.
        setup: how they exchange.
        observer: of events on this rank.
        saved: returns the newest checkpoint that this rank can read, None if there is none.
        drop_silent: at the end, continue without unresponsive workers.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        rule: Rule,
        x: Array,
        optimizer: Optimizer | None,
        center_optimizer: Optimizer | None,
        setup: Setup,
        observer: Observer,
        saved: Callable[[], Saved | None] = lambda: None,
        drop_silent: bool = False,
    ) -> None:
        setup = setup.beginning(comm.size)
        # With node centers: workers, then node centers, by their numbers.
        others = [*setup.workers(comm.size), *(node for node, *_ in setup.nodes)] if setup.nodes else []
        self.rule, self.members = rule, Membership(comm.size, setup.center_ranks, others)
        self.single_commits = setup.transport.capabilities.single_commits
        self.rank = comm.rank  # at the beginning
        self.threads = setup.place(comm).threads  # this rank's share of the cores
        set_threads(self.threads)
        self._comm, self._observer = comm, observer
        self._leaves_behind = drop_silent or setup.transport.spares > 0
        connector = Connector(rule, optimizer, center_optimizer, setup, observer)
        self.role = connector.connect(comm, x)
        self.failover: Failover | None = None
        if outlives_loss(setup.transport):
            self.failover = Failover(comm, self.role, self.members, connector, x, saved, self._set_role)
            self._watch_workers()
        self._watchdog = watch(comm, self._awaited)

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator in use; without lost ranks."""
        if self.failover is None:
            return self._comm
        return self.failover.comm

    def begin(self, total: int | None, period: int) -> None:
        """Prepare the work: `total` steps over all workers (None: no end), λ = `period`; collective."""
        self.role.begin(total, period)

    def rounds(self) -> Iterator[Sequence[Worker]]:
        """Yield the workers that this rank is to drive to the end of their work; serve in between.

        Once, but for fail-over: with another center the workers begin again, and a worker that was elected has served
        until all have left.
        """
        while True:
            if not self.role.serves:
                yield self.role.workers
            if self.role.serves:
                self.serve()
            if not self.regroup():
                return

    def serve(self) -> None:
        """At a rank that serves: until all workers have left."""
        assert isinstance(self.role, CenterRole)
        self.role.serve()

    def finish(self, worker: Worker) -> None:
        """After `worker` has left early: wait for the others, or serve them, if it was elected."""
        worker.settle()
        while True:
            if self.role.serves:
                self.serve()
            if not self.regroup():
                return
            for other in [] if self.role.serves else self.role.workers:
                other.leave()
                other.settle()

    def regroup(self) -> bool:
        """When all have left: find out who is alive; collective. Whether workers must begin again.

        They must with another center, elected because the last was lost at the very end, and on a rank that was a
        worker, was elected, and has lost all of its workers.
        """
        self._observer.left()
        if self._leaves_behind:
            hung = len(self.members.hung)
            remaining: MPI.Intracomm = leave_behind(self.comm, self.role, self.members, self.failover is not None)
            self._observer.left_behind(self.members.hung[hung:])
            if self.failover is not None:
                self.failover.comm = remaining
            else:
                self._comm = remaining
        if self.failover is None:
            return False
        elected = self.failover.regroup()
        if not elected and self.deserted and self.failover.worker is not None:
            self.role = self.failover.alone()
            self._observer.alone()
            return True
        return elected

    @property
    def deserted(self) -> bool:
        """Whether this rank serves, its work is not done, and all its workers are lost."""
        return isinstance(self.role, CenterRole) and self.role.end.deserted

    def end_lost(self) -> None:
        """Kill those of this host that were left behind, or given up for dead, with ULFM.

        Else MPI_Abort does it, with our exit code.
        """
        if self.failover is not None and self._watchdog is not None:
            for rank in self.members.lost:
                self._watchdog.peers[rank].end()

    def close(self) -> None:
        """Free ends and communicators; collective, so not where a rank was lost: it would not return."""
        self.end_lost()
        if not self.members.lost:
            self.role.close()
        if self._watchdog is not None:  # it goes on, and keeps nothing of this session
            self._watchdog.awaited = partial(list, self.members.alive)

    def _awaited(self) -> list[int]:
        """The ranks for which this one may be waiting."""
        members = self.members
        if self.failover is None or self.role.serves:
            return members.alive
        return members.serving[: members.centers]  # the center reports the others' deaths to nobody else

    def _set_role(self, role: Role) -> None:
        self.role = role
        self._watch_workers()

    def _watch_workers(self) -> None:
        """At the center: receive notice of workers that die, and of spares that take their places."""
        if isinstance(self.role, CenterRole):
            self.role.end.on_loss, self.role.end.on_join = self._worker_lost, self._worker_joined

    def _worker_joined(self, worker: int) -> None:
        self.role.center.counted.add(worker)
        self._observer.joined(self.members.rank_of(worker))

    def admit(self, comm: MPI.Comm) -> int:
        """At the center: take in a worker of another job, on the other side of `comm`; returns its number."""
        assert isinstance(self.role, CenterRole)
        self.role.end.on_loss = self._guest_lost
        number = self.role.admit(comm)
        self.role.center.counted.add(number)
        return number

    def _guest_lost(self, worker: int) -> None:
        """A worker of another job has gone: no rank of this one is lost."""
        held = self._freed(worker)
        self._observer.guest_lost(self.members.rank_of(worker), held)

    def _worker_lost(self, worker: int) -> None:
        held = self._freed(worker)
        self._observer.lost(self.members.worker_lost(worker), held)

    def _freed(self, worker: int) -> list[Lease]:
        """The leases of a lost worker, which go to the others."""
        center = self.role.center
        held = center.leases.held_by(worker) if center.leases else []
        center.worker_lost(worker)
        return held
