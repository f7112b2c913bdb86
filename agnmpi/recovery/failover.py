"""A lost center: the survivors elect the one of them that has pulled last, and it serves on from there (ULFM).

A reply brings, with c, all that the center knows (`Snapshot`), and a worker keeps both until the next pull is whole. If
the center dies, each survivor notices in its own exchange, no later than at the end of its period. They shrink the
communicator, tell each other what they hold, and elect. The elected rank restores a center from its last pull, or from
the newest checkpoint if that is newer, and books what the others hold; these send again what was not answered, and
`applied` keeps it from being applied twice. What is lost is what only the dead knew.
"""

import json
from collections.abc import Callable, Sequence

from mpi4py import MPI

from ..arrays.backend import Array, bring, full_like
from ..cluster.connect import Connector
from ..cluster.roles import CenterRole, LocalRole, Role
from ..core.leases import Leases
from ..core.membership import Membership
from ..core.worker import Phase, Worker
from ..transport.agreement import allgather
from ..transport.local import LocalCenter
from .center_state import CenterState, Saved, with_slots
from .election import Witness, elect, take_over
from .resend import ResendingEnd


class Failover:
    """Goes on without lost ranks, with another center if need be; on every rank of a session.

    Args:
        comm: of the center (rank 0) and its workers.
        role: of this rank.
        members: who is alive.
        connector: makes the role of a rank that takes the place of the center.
        x: (n,) a vector like those that are exchanged.
        saved: gives the newest checkpoint that this rank can read, None if there is none.
        on_role: told, on every rank, the role of this rank when there is a new center.
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
        """Find out who is left; collective over those. Whether the center was lost, and another elected."""
        while True:
            comm: MPI.Intracomm = self.comm.Shrink()  # type: ignore[assignment]  # Ishrink fails in Open MPI 5.0.11: internal error
            left, before = comm.Get_group(), self.comm.Get_group()
            old = list(left.Translate_ranks(list(range(left.size)), before))
            ranks = [self.members.ranks[rank] for rank in old]
            if len(old) == self.comm.size:
                comm.Free()
                return False
            if old[0] == 0:
                self.comm = comm
                if gone := self.members.shrunk(ranks):
                    self._connector.observer.missing(gone)
                return False
            if self._elect(comm, ranks):
                return True

    def alone(self) -> LocalRole:
        """At an elected center that has lost all its workers: it trains on, within this process."""
        assert self.worker is not None
        assert isinstance(self._role, CenterRole)
        worker, serving = self.worker, self._role
        c, center = full_like(worker.x, bring(serving.c, worker.x)), serving.center
        center.move(c)
        center.workers, center.applied, center.on_block = 1, [worker.sequence], None
        role = LocalRole(center, [worker], LocalCenter(c, 1, serving.apply))
        role.session, role.total, role.period = serving.session, serving.total, serving.period
        self._train_within(role, worker)
        self._role = role
        return role

    def _elect(self, comm: MPI.Intracomm, ranks: list[int]) -> bool:
        """Elect a center among `ranks`, which are left; False if another rank has died meanwhile."""
        assert self.worker is not None
        own, agreed = Witness.of(self.worker, self.members.ranks[self.comm.rank]), 1
        try:
            witnesses = [Witness.read(text) for text in allgather(comm, json.dumps(own))]
            winner = elect(witnesses)
            made: MPI.Intracomm = comm.Split(0, 0 if comm.rank == winner else comm.rank + 1)  # type: ignore[assignment]
        except MPI.Exception:
            comm.Revoke()
            agreed = 0
        try:
            agreed = comm.Agree(agreed)
        except MPI.Exception:
            return False  # all hear of it here
        if not agreed:
            return False
        order = [winner, *(i for i in range(comm.size) if i != winner)]
        self.comm = made
        serving_before = self.members.workers()
        gone = self.members.elected([ranks[i] for i in order])
        source = self.take_role([witnesses[i] for i in order], serving_before)
        self._connector.observer.new_center(source, gone)
        return True

    def take_role(self, witnesses: Sequence[Witness], workers_before: Sequence[int]) -> str:
        """Serve, if this rank was elected, else work for the new center; returns from where that has begun.

        Args:
            witnesses: by rank of now; the first is elected.
            workers_before: ranks of the workers of the lost center.
        """
        assert self.worker is not None
        worker, source = self.worker, ""
        if self.comm.rank:
            worker.index = self.comm.rank - 1
            if worker.last_reply:  # by the indices of now, for the next time
                applied = worker.last_reply.applied
                worker.last_reply = worker.last_reply._replace(applied=tuple(applied[w.worker] for w in witnesses[1:]))
            self._end.replace(self._connector.worker_end(self.comm, self._x))
            self._role.count = self._role.center.workers = self.comm.size - 1
        else:
            self._role, source = self._restore(worker, witnesses, workers_before)
        self._on_role(self._role)
        return source

    def _restore(self, worker: Worker, witnesses: Sequence[Witness], workers_before: Sequence[int]) -> tuple[Role, str]:
        """The role of the new center, from the last pull of this rank or from the newest checkpoint; and from where."""
        before, saved = self._role, self._saved()
        state = CenterState.pulled(worker, workers_before)
        if saved is not None and (checkpointed := CenterState.saved(saved)).served > state.served:
            state = checkpointed
        role = self._connector.alone(state.c, worker) if self.comm.size == 1 else self._serving(state.c)
        arrays, facts, source = with_slots(state, role.center.optimizer, role.center.state, saved)
        role.resume(arrays, {**facts, "leases": Leases(None, 1).state(), "applied": ()})
        role.session = before.session - 1
        role.begin(before.total, before.period)
        role.center.checkpoint = state.checkpoint
        leases = state.leases if state.session == before.session else Leases(None, 1).state()  # else: none seen
        own = take_over(role.center, leases, state.applied, witnesses, first=0 if self.comm.size == 1 else 1)
        if own is not None:
            self._apply_own(role, own)
        if isinstance(role, LocalRole):
            self._train_within(role, worker)
        return role, source

    def _serving(self, c: Array) -> CenterRole:
        assert self.worker is not None
        on_device = self._connector.setup.transport.center_device == "gpu"
        return self._connector.center(self.comm, bring(c, self.worker.x) if on_device else c)

    def _apply_own(self, role: Role, index: int) -> None:
        """The commit of this rank that was under way when the center died: it counts as a worker's, `index`."""
        center, commit = role.center, self._end.sending
        if commit is None or commit.payload is None:
            assert center.leases is not None
            center.leases.release(index)
            return
        center.applied.append(commit.sequence - 1)
        payload = bring(commit.payload, role.c)
        assert isinstance(role, CenterRole)
        role.apply(commit._replace(worker=index, requests=0, payload=payload), role.c)
        center.applied.pop()

    def _train_within(self, role: LocalRole, worker: Worker) -> None:
        worker.index = 0
        if worker.elected:
            worker.phase = Phase.LEFT
        self._end.replace(role.worker_end())

    def _center_lost(self) -> bool:
        """Called by an exchange that has found the center dead: whether this rank is to serve now."""
        return self.regroup() and self.comm.rank == 0 and self.comm.size > 1
