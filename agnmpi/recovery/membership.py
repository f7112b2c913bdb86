"""Which ranks of a training job are still there: the dead, the silent, those that come back, and who serves them."""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from ..cluster.processes import end_sibling, process
from ..cluster.roles import Role
from ..core.backoff import wait_until
from ..core.timer import Every
from ..transport.agreement import allgather

_LEFT = 9  # tag: the ranks that go on
Say = Callable[[str], None]


class Membership:
    """The ranks of a job, by the numbers that they had when it began; collective over `comm`.

    `host`: of this rank; `first`: rank of worker 0; `stall_limit`: seconds of silence after which a worker is
    reported, 0 for never; `drop`: and no longer waited for; `say` is told what happens, `note` (event, facts) of
    deaths.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        host: str,
        first: int,
        stall_limit: float,
        drop: bool,
        say: Say,
        note: Callable[..., None],
    ) -> None:
        self.comm, self.rank = comm, comm.rank
        self.lost: list[int] = []
        self.hung: list[int] = []  # of these, the ones that live, but do not answer
        self.role: Role  # set when it is wired
        self._first, self._stall_limit, self._drop = first, stall_limit, drop
        self._say, self._note = say, note
        self._heard: dict[int, float] = {}  # when each worker last gave a sign of life
        self._stalled = set[int]()  # those that have been reported
        self._look = Every(seconds=1.0)
        told = [json.loads(text) for text in allgather(comm, json.dumps([host, process()]))]
        self._hosts, self._processes = [there for there, _ in told], [theirs for _, theirs in told]

    def name(self, rank: int) -> str:
        """The rank, and where it runs."""
        return f"rank {rank} on {self._hosts[rank]}"

    def watch(self) -> None:
        """From now on this rank serves."""
        self._heard = dict.fromkeys(range(self.role.count), time.monotonic())

    def heard(self, worker: int, leaves: bool) -> None:
        """A sign of life."""
        self._heard[worker] = time.monotonic()
        if leaves:
            del self._heard[worker]

    def tick(self) -> None:
        """Report, once, the workers that have been silent for too long; and those that are back."""
        if not self._stall_limit or not self._look():
            return
        now = time.monotonic()
        for worker in self.role.center.waiting & set(self._heard):  # it is the center that is silent
            self._heard[worker] = now
        for worker, last in self._heard.items():
            rank, silent = self._rank_of(worker), now - last
            if rank in self.lost:
                continue
            stalled, what = silent >= self._stall_limit, ""
            if stalled != (worker in self._stalled):
                self._stalled ^= {worker}
                what = f"is silent for {silent:.1f} s" if stalled else "is back"
            if stalled and self._drop and self._wait_no_longer(worker):
                what = f"is silent for {silent:.1f} s and is dropped: what it had not committed goes to the others"
            if what:
                self._say(f"WARNING: {self.name(rank)} {what}, at step {self.role.center.steps}")

    def _wait_no_longer(self, worker: int) -> bool:
        end: Any = self.role.end
        if worker in end.silent or len(end.lost | end.silent | {worker}) == self.role.count:
            return False  # the last one is waited for
        self.role.center.worker_lost(worker)
        end.stop_waiting_for(worker)
        return True

    def lose(self, worker: int) -> None:
        """A worker has died: what it had not committed goes to the others."""
        center, rank = self.role.center, self._rank_of(worker)
        end: Any = self.role.end
        self.lost.append(rank)
        held = center.leases.held_by(worker) if center.leases else []
        center.worker_lost(worker)
        self._say(
            f"WARNING: {self.name(rank)} is lost, at step {center.steps}; what it had not committed goes to the "
            f"{self.role.count - len(end.lost)} others"
        )
        self._note("lost", rank=rank, host=self._hosts[rank], uncommitted=held)

    def regroup(self) -> bool:
        """When all have left: find out who is there, collective over those. Whether a new center is to go on."""
        if self._drop:
            self._leave_behind()
        failover = self.role.failover
        if failover is None:
            return False
        elected = failover.regroup()
        self.comm = failover.comm
        for rank in set(failover.lost) - set(self.lost):
            self.lost.append(rank)
            if self.role.serves:
                self._say(f"WARNING: {self.name(rank)} is lost, after its work was done")
        return elected

    def _leave_behind(self) -> None:
        """Go on without the workers that are dropped and do not answer; collective over the others."""
        comm, failover = self.comm, self.role.failover
        if comm.size != self.role.count + 1:  # it was done before, or there is nobody else
            return
        try:
            if self.role.serves:
                end: Any = self.role.end
                left = [0] + [w + 1 for w in range(self.role.count) if w not in end.silent | end.lost]
                for rank in left[1:]:
                    try:
                        wait_until(comm.Isend(np.array([len(left), *left]), rank, _LEFT).Test)
                    except MPI.Exception:  # this one has died just now; the others are waiting for the message
                        if failover is None:
                            raise
            else:
                said = np.empty(comm.size + 1, np.int64)
                wait_until(comm.Irecv(said, 0, _LEFT).Test)
                left = said[1:][: said[0]].tolist()
            if len(left) == comm.size:
                return
            # Not Create_group: Open MPI 5.0 refuses it where a rank outside of the group has died.
            living = MPI.Intracomm.Create_from_group(comm.Get_group().Incl(left), "agnmpi.living")
        except MPI.Exception:
            if failover is None:
                raise
            return  # another rank has died just now: the next step finds out
        ranks = failover.ranks if failover else list(range(comm.size))
        self.hung = sorted({rank for i, rank in enumerate(ranks) if i not in left} - set(self.lost))
        self.lost = sorted({*self.lost, *self.hung})
        self.comm = living
        if failover is not None:
            failover.comm, failover.ranks = self.comm, [ranks[i] for i in left]

    def follow(self) -> list[int]:
        """Another center has been elected; returns the ranks that were not known to be lost."""
        failover = self.role.failover
        assert failover is not None
        before, self.lost, self.comm = self.lost, failover.lost, failover.comm
        role: Any = failover.role
        self.role = role
        return [rank for rank in self.lost if rank not in before]

    def end_hung(self) -> None:
        """With ULFM: kill what hangs on this host; else MPI_Abort does it, and the exit code is ours."""
        if self.role.failover is not None:
            for rank in self.hung:
                end_sibling(*self._processes[rank])

    def _rank_of(self, worker: int) -> int:
        failover = self.role.failover
        return failover.served[worker + 1] if failover else worker + self._first
