"""Workers without any message for too long: reported, no longer waited for, and left behind at the end.

So are spares that were not called, and do not answer at the end: they hold nothing that anyone waits for.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from ..cluster.role import Role
from ..cluster.roles import CenterRole
from ..core.backoff import Backoff, Every, StandsStill, wait_until
from ..core.ends import CenterEnd
from ..core.membership import Membership
from ..core.messages import LEAVE, Commit

_REMAINING, _HERE = 9, 10  # tags: the ranks that continue; a spare that was not called has left
_LIVING = "agnmpi.living"  # their communicator


class SilentWorkers:
    """At the rank that serves: reports workers that have sent nothing for `limit` seconds.

    Args:
        role: of this rank.
        members: who is alive.
        limit: seconds of silence after which a worker is reported; 0 for never.
        drop: whether the center then stops waiting for it.
        name: describes a rank.
        say: called with each message for the user.
        patience: the limit is at least so many times the longest silence that a message has ended.
    """

    def __init__(
        self, role: CenterRole, members: Membership, limit: float, drop: bool,
        name: Callable[[int], str], say: Callable[[str], None], patience: float = 0.0,
    ) -> None:  # fmt: skip
        self._role, self._members, self._limit, self._drop = role, members, limit, drop
        self._name, self._say, self._patience = name, say, patience
        self._last_seen = dict.fromkeys(role.numbers, time.monotonic())  # time of the last message, by worker
        self._reported = set[int]()
        self._check_due = Every(seconds=1.0)

    def served(self, commit: Commit) -> None:
        """A worker has sent this. If it leaves, its silence is not reported."""
        now = time.monotonic()
        self._limit = max(self._limit, self._patience * (now - self._last_seen.get(commit.worker, now)))
        self._last_seen[commit.worker] = now
        if commit.requests & LEAVE:
            del self._last_seen[commit.worker]

    def tick(self) -> None:
        """Report, once, the workers that have been silent for too long, and those that are back."""
        if not self._limit or not self._check_due():
            return
        now = time.monotonic()
        # These wait for work that others hold, or to be called.
        self._last_seen |= dict.fromkeys([*self._role.center.waiting, *self._role.end.spares], now)
        for worker, last in list(self._last_seen.items()):
            rank, silent = self._members.rank_of(worker), now - last
            if rank in self._members.lost or worker in self._role.end.lost:
                continue
            stalled, change = silent >= self._limit, ""
            if stalled != (worker in self._reported):
                self._reported ^= {worker}
                change = f"is silent for {silent:.1f} s" if stalled else "is back"
                change += ", and is waited for: no other worker is left" if stalled and self._drop else ""
            if stalled and self._drop and self._wait_no_longer(worker):
                change = f"is silent for {silent:.1f} s and is dropped: what it had not committed goes to the others"
            if change:
                self._say(f"WARNING: {self._name(rank)} {change}, at step {self._role.center.steps}")

    def _wait_no_longer(self, worker: int) -> bool:
        end = self._role.end
        if worker in end.silent or len({*end.lost, *end.silent, worker}) == len(self._role.numbers):
            return False  # the last one is always waited for
        self._role.center.worker_lost(worker)
        end.stop_waiting_for(worker)
        return True


def leave_behind(comm: MPI.Intracomm, role: Role, members: Membership, outlives_loss: bool) -> MPI.Intracomm:
    """Continue without the unresponsive workers and spares; collective over the others. Returns their communicator.

    Args:
        comm: with all that are not known to be dead.
        role: of this rank.
        members: who is alive; updated with the unresponsive ones.
        outlives_loss: whether ranks may die meanwhile.
    """
    if comm.size == 1:
        return comm
    try:
        if role.serves:
            remaining = _send_remaining(comm, role, members, outlives_loss)
        else:
            if any(worker.spare for worker in role.workers):
                comm.Isend(bytearray(), 0, _HERE).Wait()  # so short that it does not wait for its receiver
            received = np.empty(comm.size + 1, np.int64)
            wait_until(comm.Irecv(received, 0, _REMAINING).Test)
            remaining = received[1:][: received[0]].tolist()
        if len(remaining) == comm.size:
            return comm
        group = comm.Get_group().Incl(remaining)
        # Open MPI 4.1 has no Create_from_group; 5.0 refuses Create_group where a rank outside of the group has died.
        living = MPI.Intracomm.Create_from_group(group, _LIVING) if outlives_loss else comm.Create_group(group)
    except MPI.Exception:
        if not outlives_loss:
            raise
        return comm  # another rank has died just now: the next step notices
    members.left_behind([members.ranks[rank] for rank in remaining])
    return living


def _send_remaining(comm: MPI.Intracomm, role: Role, members: Membership, outlives_loss: bool) -> list[int]:
    assert isinstance(role, CenterRole)
    _await_spares(comm, role.end, members)
    absent = {members.rank_of(worker) for worker in {*role.end.silent, *role.end.lost}}
    remaining = [rank for rank in range(comm.size) if members.ranks[rank] not in absent]
    for rank in remaining[1:]:
        try:
            wait_until(comm.Isend(np.array([len(remaining), *remaining]), rank, _REMAINING).Test)
        except MPI.Exception:  # this one has died just now; the others are waiting for the message
            if not outlives_loss:
                raise
    return remaining


def _await_spares(comm: MPI.Intracomm, end: CenterEnd, members: Membership) -> None:
    """Wait until the spares that were not called have left; those that do not move any more are silent from now on."""
    late = {members.ranks.index(members.rank_of(worker)): worker for worker in end.spares if worker not in end.silent}
    backoff, stands_still = Backoff(), StandsStill()
    while late and not stands_still(end.progress - len(late)):
        end.flush()
        for rank in list(late):
            with suppress(MPI.Exception):  # it has died: whoever shrinks the communicator notices
                if not comm.Iprobe(rank, _HERE):
                    continue
                comm.Recv(bytearray(), rank, _HERE)
            del late[rank]
        backoff.wait()
    for worker in late.values():
        end.stop_waiting_for(worker)
