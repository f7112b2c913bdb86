"""Fail-over from a lost center: the survivors elect the one with the latest pull, which serves from there (ULFM).

A reply holds, with c, the state of the center (`Snapshot`), and a worker keeps both until the next pull is complete. If
the center dies, each survivor notices in its own exchange, no later than at the end of its period. They shrink the
communicator, exchange the leases that they hold, and elect. The elected rank restores a center from its last pull, or
from the newest checkpoint if that is newer, and records the others' leases; these resend commits without a reply, and
`applied` prevents that one is applied twice. Only what no survivor has seen is lost.
"""

import json
from collections.abc import Callable, Sequence

from mpi4py import MPI

from ..arrays.backend import Array, bring, full_like
from ..cluster.connect import Connector
from ..cluster.role import Role
from ..cluster.roles import CenterRole, LocalRole
from ..core.leases import Leases
from ..core.membership import Membership
from ..core.worker import Phase, Worker
from ..transport.agreement import allgather
from ..transport.local import LocalCenter
from .center_state import CenterState, Saved, with_slots
from .election import SurvivorReport, elect, take_over
from .resend import ResendingEnd
from .watchdog import calling


class Failover:
    """Continues without lost ranks, with another center if necessary; on every rank of a session.

    Args:
        comm: of the center (rank 0) and its workers.
        role: of this rank.
        members: who is alive.
        connector: builds the role of a rank that replaces the center.
        x: (n,) a vector like those that are exchanged.
        saved: returns the newest checkpoint that this rank can read, None if there is none.
        on_role: called, on every rank, with its role when there is a new center.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        role: Role,
        members: Membership,
        connector: Connector,
        x: Array,
        saved: Callable[[], Saved | None],
        on_role: Callable[[Role], None],
    ) -> None:
        self.comm, self.members = comm, members
        self.worker: Worker | None = None if role.serves else role.workers[0]
        self._role, self._connector, self._x, self._saved, self._on_role = role, connector, x, saved, on_role
        if self.worker is not None:
            self._end = ResendingEnd(self.worker.end, self.worker, self._center_lost)
            self.worker.end = self._end

    def regroup(self) -> bool:
        """Find out who is alive; collective over those. Whether the center was lost, and another elected."""
        while True:
            comm = self._shrink()
            alive, before = comm.Get_group(), self.comm.Get_group()
            old = list(alive.Translate_ranks(list(range(alive.size)), before))
            ranks = [self.members.ranks[rank] for rank in old]
            if len(old) == self.comm.size:
                comm.Free()
                return False
            if old[0] == 0:
                self.comm = comm
                if newly_lost := self.members.shrunk(ranks):
                    self._connector.observer.missing(newly_lost)
                return False
            if self._elect(comm, ranks):
                return True

    def _shrink(self) -> MPI.Intracomm:
        reported = self.comm.Get_failed()
        failed = reported.Translate_ranks(list(range(reported.size)), self.comm.Get_group())
        awaited = [rank for i, rank in enumerate(self.members.ranks) if i not in failed]
        with calling("MPI_Comm_shrink", awaited):
            return self.comm.Shrink()  # type: ignore[return-value]  # Ishrink fails in Open MPI 5.0.11: internal error

    def alone(self) -> LocalRole:
        """At an elected center that has lost all its workers: it goes on training, within this process."""
        assert self.worker is not None
        worker, serving = self.worker, self._role
        c, center = full_like(worker.x, bring(serving.c, worker.x)), serving.center
        center.move(c)
        center.workers, center.counted, center.applied, center.on_block = 1, {0}, [worker.sequence], None
        role = LocalRole(center, [worker], 1, LocalCenter(c, 1, center.apply))
        role.session, role.total, role.period = serving.session, serving.total, serving.period
        self._train_within(role, worker)
        self._role = role
        return role

    def _elect(self, comm: MPI.Intracomm, ranks: list[int]) -> bool:
        """Elect a center among the surviving `ranks`; False if another rank has died meanwhile."""
        assert self.worker is not None
        report, agreed = SurvivorReport.of(self.worker, self.members.ranks[self.comm.rank]), 1
        try:
            with calling("MPI_Comm_split", ranks):
                reports = [SurvivorReport.read(text) for text in allgather(comm, json.dumps(report))]
                winner = elect(reports)
                reordered: MPI.Intracomm = comm.Split(0, 0 if comm.rank == winner else comm.rank + 1)  # type: ignore[assignment]
        except MPI.Exception:
            comm.Revoke()
            agreed = 0
        try:
            with calling("MPI_Comm_agree", ranks):
                agreed = comm.Agree(agreed)
        except MPI.Exception:
            return False  # Agree reports the failure on all ranks
        if not agreed:
            return False
        order = [winner, *(i for i in range(comm.size) if i != winner)]
        self.comm = reordered
        serving_before = self.members.workers()
        newly_lost = self.members.elected([ranks[i] for i in order])
        source = self.take_role([reports[i] for i in order], serving_before)
        self._connector.observer.new_center(source, newly_lost)
        return True

    def take_role(self, reports: Sequence[SurvivorReport], workers_before: Sequence[int]) -> str:
        """Serve, if this rank was elected, else become a worker of the new center; returns the source of its state.

        Args:
            reports: by rank of the new communicator; the first is elected.
            workers_before: ranks of the workers of the lost center.
        """
        assert self.worker is not None
        worker, source = self.worker, ""
        if self.comm.rank:
            worker.index = self.comm.rank - 1
            if worker.last_reply:  # by the new indices, for the next fail-over
                applied = worker.last_reply.applied
                worker.last_reply = worker.last_reply._replace(applied=tuple(applied[w.worker] for w in reports[1:]))
            end = self._connector.encoded(self._connector.worker_end(self.comm, self._x), self._x)
            if self._end.residual is not None:
                end.restore(self._end.residual)
            self._end.replace(self._connector.threaded(end, self._x))
            count = self._connector.setup.transport.workers_among(self.comm.size)
            self._role.count = self._role.center.workers = count
        else:
            self._role, source = self._restore(worker, reports, workers_before)
        self._on_role(self._role)
        return source

    def _restore(
        self, worker: Worker, reports: Sequence[SurvivorReport], workers_before: Sequence[int]
    ) -> tuple[Role, str]:
        """The role of the new center, from the last pull of this rank or from the newest checkpoint; and its source."""
        before, saved = self._role, self._saved()
        state = CenterState.pulled(worker, workers_before)
        if saved is not None and (checkpointed := CenterState.saved(saved)).served > state.served:
            state = checkpointed
        elif worker.spare and not worker.last_reply:  # it holds no model
            raise RuntimeError("the center and all workers are lost before the first checkpoint: start the run again")
        role = self._connector.alone(state.c, worker) if self.comm.size == 1 else self._serving(state.c, reports[1:])
        arrays, facts, source = with_slots(state, role.center.optimizer, role.center.state, saved)
        role.resume(arrays, {**facts, "leases": Leases(None, 1).state(), "applied": ()})
        role.session = before.session - 1
        role.begin(before.total, before.period)
        role.center.checkpoint = state.checkpoint
        leases = state.leases if state.session == before.session else Leases(None, 1).state()  # else: no leases seen
        extra_worker = take_over(role.center, leases, state.applied, reports, first=0 if self.comm.size == 1 else 1)
        if extra_worker is not None:
            self._apply_own_commit(role, extra_worker)
        worker.spare = False
        if isinstance(role, LocalRole):
            self._train_within(role, worker)
        return role, source

    def _serving(self, c: Array, workers: Sequence[SurvivorReport]) -> CenterRole:
        assert self.worker is not None
        on_device = self._connector.setup.transport.center_device == "gpu"
        role = self._connector.center(self.comm, bring(c, self.worker.x) if on_device else c)
        role.end.dispensable = {i for i, report in enumerate(workers) if report.spare}
        return role

    def _apply_own_commit(self, role: Role, index: int) -> None:
        """Apply this rank's commit that was under way when the center died, as that of worker `index`."""
        center, commit = role.center, self._end.sending
        if commit is None or commit.payload is None:
            assert center.leases is not None
            center.leases.release_all(index)
            return
        center.applied.append(commit.sequence - 1)
        payload = bring(commit.payload, role.c)
        role.center.apply(commit._replace(worker=index, requests=0, payload=payload), role.c)
        center.applied.pop()

    def _train_within(self, role: LocalRole, worker: Worker) -> None:
        worker.index = 0
        if worker.elected:
            worker.phase = Phase.LEFT
        self._end.replace(role.worker_end())

    def _center_lost(self) -> bool:
        """Called by an exchange when the center has died: whether this rank was elected to serve."""
        return self.regroup() and self.comm.rank == 0 and self.comm.size > 1
