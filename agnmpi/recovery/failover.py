"""A lost center: the survivors elect the one of them that has pulled last, and it serves on from there (ULFM).

A reply brings, with c, all that the center knows (`Snapshot`), and a worker keeps both until the next pull is whole. If
the center dies, each survivor notices in its own exchange, no later than at the end of its period. They shrink the
communicator, tell each other what they hold, and elect. The elected rank restores a center from its last pull, or from
the newest checkpoint if that is newer, and books what the others hold; these send again what was not answered, and
`applied` keeps it from being applied twice. What is lost is what only the dead knew.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array, bring, empty_like
from ..core.center import Center
from ..core.ends import Capabilities, Elected, Handle, WorkerEnd
from ..core.leases import Leases
from ..core.messages import Commit, Reply, Snapshot
from ..core.worker import Phase, Worker
from ..transport.agreement import allgather
from ..transport.local import LocalCenter
from ..transport.p2p import P2PWorker, gone
from .election import Witness, elect, take_over

Saved: TypeAlias = tuple[Mapping[str, Array], Mapping[str, Any]]  # a checkpoint: arrays and facts


class Role(Protocol):
    """What is asked of a rank's part (`role.Role`)."""

    center: Center
    workers: list[Worker]
    count: int
    serves: bool
    end: Any
    failover: "Failover | None"
    session: int
    total: int | None
    period: int

    def resume(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Restore the center."""

    def begin(self, total: int | None, period: int) -> None:
        """Lay out the work."""

    def apply(self, commit: Commit, c: Array) -> Reply | None:
        """Apply a commit."""


class Failover:
    """Who is left, and who serves them; on every rank.

    `comm`: of the center (rank 0) and its workers; `make_end(comm)`: a worker's end; `make_role(comm, c, worker)`:
    the part of a rank that takes the place of the center.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        role: Role,
        make_end: Callable[[MPI.Comm], WorkerEnd] | None = None,
        make_role: Callable[[MPI.Comm, Array, Worker], Role] | None = None,
    ) -> None:
        self.comm, self.role, self._size = comm, role, comm.size
        self.ranks = list(range(comm.size))  # of the communicator of the beginning, by rank of `comm`
        self.served = self.ranks  # likewise, by rank of the communicator of the center's end
        self.source = ""  # where the last new center has begun
        self.checkpoint: Callable[[], Saved | None] = lambda: None  # gives the newest
        self.on_center: Callable[[], None] = lambda: None  # called on every rank when there is a new center
        self._make_end, self._make_role = make_end, make_role
        self._buried: list[object] = []  # exchanges with the dead: MPI may still touch their memory
        self.sending: Commit | None = None  # what the exchange under way brings
        self.worker = role.workers[0] if role.workers else None
        if self.worker:
            self.end = self.worker.end
            self.worker.end = FailoverEnd(self)

    @property
    def lost(self) -> list[int]:
        """Ranks of the beginning that are no more, as far as `regroup` has found out."""
        return sorted(set(range(self._size)) - set(self.ranks))

    def regroup(self) -> bool:
        """Find out who is left; collective over those. Whether the center was lost, and another elected."""
        while True:
            comm = self.comm.Shrink()  # Ishrink fails in Open MPI 5.0.11: internal error
            group, before = comm.Get_group(), self.comm.Get_group()
            old = list(group.Translate_ranks(list(range(group.size)), before))
            ranks = [self.ranks[rank] for rank in old]
            if len(old) == self.comm.size:
                comm.Free()
                return False
            if old[0] == 0:
                self.comm, self.ranks = comm, ranks
                return False
            assert self.worker is not None
            mine, agreed = Witness.of(self.worker, self.ranks[self.comm.rank]), 1
            try:
                witnesses = [Witness.read(text) for text in allgather(comm, json.dumps(mine))]
                winner = elect(witnesses)
                made = comm.Split(0, 0 if comm.rank == winner else comm.rank + 1)
            except MPI.Exception:
                comm.Revoke()
                agreed = 0
            try:
                agreed = comm.Agree(agreed)
            except MPI.Exception:
                agreed = 0  # another rank has died meanwhile, and all hear of it here
            if agreed:
                break
        order = [winner, *(i for i in range(comm.size) if i != winner)]
        self.comm, self.ranks = made, [ranks[i] for i in order]
        self.served = self.ranks
        self._take_roles([witnesses[i] for i in order])
        self.on_center()
        return True

    def alone(self) -> None:
        """At an elected center that has lost all its workers: it trains on, within this process."""
        assert self.worker is not None
        role, worker = self.role, self.worker
        c = bring(role.end.c, worker.x)
        role.center.move(c)
        role.center.workers, role.center.applied, role.center.on_block = 1, [worker.sequence], None
        local = LocalCenter(c, 1, role.apply)
        role.workers, role.count, role.serves, role.end = [worker], 1, False, local
        worker.index, worker.phase, self.end = 0, Phase.LEFT, local.worker_end(0)

    def bury(self, handle: object) -> None:
        """Keep what belongs to an exchange with a dead center."""
        self._buried.append(handle)

    def _take_roles(self, witnesses: Sequence[Witness]) -> None:
        assert self.worker is not None
        assert self._make_end is not None
        worker, comm = self.worker, self.comm
        if comm.rank:
            worker.index = comm.rank - 1
            if worker.last_reply:  # by the indices of now, for the next time
                applied = worker.last_reply.applied
                worker.last_reply = worker.last_reply._replace(
                    applied=tuple(applied[other.worker] for other in witnesses[1:])
                )
            self.end = self._make_end(comm)
            self.role.count = self.role.center.workers = comm.size - 1
            return
        self.role = self._restore(witnesses)
        if comm.size == 1:
            local: LocalCenter = self.role.end
            worker.index, self.end = 0, local.worker_end(0)

    def _restore(self, witnesses: Sequence[Witness]) -> Role:
        """Make the center, from the last pull of this rank or from the newest checkpoint."""
        assert self.worker is not None
        assert self._make_role is not None
        worker, before = self.worker, self.role
        facts: Mapping[str, Any]
        c, facts = _remembered(worker, len(before.center.applied))
        saved = self.checkpoint()
        source = f"its last pull, clock {facts['clock']}"
        if saved is not None and saved[1].get("served", 0) > facts["served"]:
            # By rank: since it was written another center may have numbered the workers anew.
            by_rank = dict(zip(saved[1].get("ranks", ()), saved[1]["applied"]))
            applied = {witness.worker: by_rank.get(witness.rank, 0) for witness in witnesses}
            c, facts = saved[0]["c"], {**saved[1], "applied": applied}
            source = f"the newest checkpoint, clock {facts['clock']}"
        if worker.last_reply is None and not facts["clock"]:
            source = "the beginning"
        role = self._make_role(self.comm, c, worker)
        center = role.center
        slots = center.optimizer.slots(center.state) if center.optimizer else {}
        if saved is not None and all(f"slot/{name}" in saved[0] for name in slots):
            slots = {name: saved[0][f"slot/{name}"] for name in slots}
            facts = {**facts, "center_optimizer_step": saved[1]["center_optimizer_step"]}
        elif slots:
            source += f"; no checkpoint has the slots of its {center.optimizer.name}, which start anew"  # type: ignore[union-attr]
        arrays = {"c": c} | {f"slot/{name}": slot for name, slot in slots.items()}
        name = center.optimizer.name if center.optimizer else "add"
        empty = Leases(None, 1).state()
        role.resume(arrays, {**facts, "center_optimizer": name, "leases": empty, "applied": ()})
        role.session = before.session - 1
        role.begin(before.total, before.period)
        center.checkpoint = int(facts.get("checkpoint", facts["steps"]))
        if facts.get("session", before.session) != before.session:  # nothing of this session has been seen
            facts = {**facts, "leases": empty}
        own, sequences = take_over(center, facts, witnesses, first=min(1, self.comm.size - 1))
        if own and self.sending is not None and self.sending.payload is not None:
            center.applied = [*sequences[:-1], self.sending.sequence - 1]
            payload = bring(self.sending.payload, role.end.c)
            own_commit = self.sending._replace(worker=len(sequences) - 1, requests=0, payload=payload)
            role.apply(own_commit, role.end.c)
            center.applied.pop()
        elif own:
            assert center.leases is not None
            center.leases.release(len(sequences) - 1)
        role.failover, self.source = self, source
        return role


def _remembered(worker: Worker, workers: int) -> tuple[Array, dict[str, Any]]:
    """The center as `worker` has pulled it last, and the facts of a checkpoint of it."""
    last_reply = worker.last_reply or Reply(0)
    snapshot = last_reply.snapshot or Snapshot(served=-1)
    return (worker.o if worker.last_reply else worker.x), {
        "clock": last_reply.clock,
        "steps": last_reply.steps,
        "applied": [*last_reply.applied, *[0] * (workers - len(last_reply.applied))],
        "served": snapshot.served,
        "session": snapshot.session,
        "refused": snapshot.refused,
        "dropped": snapshot.dropped,
        "given_up": snapshot.given_up,
        "staleness": [snapshot.staleness_sum, snapshot.staleness_max],
        "center_optimizer_step": 0,
        "checkpoint": last_reply.checkpoint,
        "leases": {"next": snapshot.next, "free": snapshot.open, "given_up": snapshot.given_up},
    }


class FailoverEnd:
    """A worker's end that goes on with another center when the one of now is lost; may raise Elected."""

    capabilities: Capabilities = P2PWorker.capabilities._replace(survives_loss=True)

    def __init__(self, failover: Failover) -> None:
        self._failover = failover

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """As of the end within."""
        return _Again(self._failover, lambda end, into: end.exchange(self._mine(commit), into), out, commit)

    def pull(self, out: Array) -> Handle:
        """As of the end within."""
        return _Again(self._failover, lambda end, into: end.pull(into), out)  # type: ignore[arg-type]

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """As of the end within."""

        def begin(end: WorkerEnd, into: Array | None) -> Handle:
            assert into is not None
            return end.leave(None if commit is None else self._mine(commit), into)

        return _Again(self._failover, begin, out, commit)

    def _mine(self, commit: Commit) -> Commit:
        """The commit, of the index that this worker has at the center of now."""
        assert self._failover.worker is not None
        return commit._replace(worker=self._failover.worker.index)

    def close(self) -> None:
        """As of the end within."""
        self._failover.end.close()


class _Again:
    """An exchange that is begun anew where the center is lost."""

    def __init__(
        self,
        failover: Failover,
        begin: Callable[[WorkerEnd, Array | None], Handle],
        out: Array | None,
        commit: Commit | None = None,
    ) -> None:
        self._failover, self._begin, self._out, self._into = failover, begin, out, out
        self._handle: Handle | None = None
        self._reply: Reply | None = None
        failover.sending = commit
        self._start()

    def _start(self) -> None:
        while self._handle is None:
            try:
                self._handle = self._begin(self._failover.end, self._into)
            except MPI.Exception as error:
                self._lost(error)

    def _lost(self, error: MPI.Exception) -> None:
        if not gone(error):
            raise error
        self._failover.bury((self._handle, self._into))
        self._handle = None
        if not self._failover.regroup():
            raise error
        if self._failover.comm.rank == 0 and self._failover.comm.size > 1:
            raise Elected
        if self._out is not None:
            self._into = empty_like(self._out)  # what the dead has sent may still arrive in the other, for a moment

    def _attempt(self, finished: Callable[[Handle], bool]) -> bool:
        """Whether the exchange is done, once `finished` has been asked."""
        if self._reply is None:
            assert self._handle is not None
            try:
                if not finished(self._handle):
                    return False
            except MPI.Exception as error:
                self._lost(error)
                self._start()
                return False
            self._reply, self._failover.sending = self._handle.wait(), None
            if self._out is not None and self._into is not self._out:
                self._out[...] = self._into
        return True

    def test(self) -> bool:
        """Make progress; whether the exchange is done. May raise Elected."""
        return self._attempt(lambda handle: handle.test())

    def wait(self) -> Reply:
        """Finish the exchange. May raise Elected."""
        while not self._attempt(lambda handle: bool(handle.wait())):
            pass
        assert self._reply is not None
        return self._reply
