"""Workers that are silent for too long: reported, no longer waited for, and left behind at the end."""

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from ..cluster.roles import CenterRole, Role
from ..core.backoff import wait_until
from ..core.membership import Membership
from ..core.timer import Every

_LEFT = 9  # tag: the ranks that go on


class SilentWorkers:
    """At the rank that serves: hears the workers, and tells of those that it has not heard for `limit` seconds.

    Args:
        role: of this rank.
        members: who is alive.
        limit: seconds of silence after which a worker is reported; 0 for never.
        drop: and no longer waited for.
        name: of a rank, in words.
        say: told what happens.
    """

    def __init__(
        self, role: CenterRole, members: Membership, limit: float, drop: bool,
        name: Callable[[int], str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._role, self._members, self._limit, self._drop = role, members, limit, drop
        self._name, self._say = name, say
        self._heard = dict.fromkeys(range(role.count), time.monotonic())  # when each worker last gave a sign of life
        self._reported = set[int]()
        self._look = Every(seconds=1.0)

    def heard(self, worker: int) -> None:
        """A sign of life."""
        self._heard[worker] = time.monotonic()

    def excused(self, worker: int) -> None:
        """This worker has left: it will be silent."""
        self._heard.pop(worker, None)

    def tick(self) -> None:
        """Report, once, the workers that have been silent for too long; and those that are back."""
        if not self._limit or not self._look():
            return
        now = time.monotonic()
        self._heard |= dict.fromkeys(self._role.center.waiting, now)  # for work that others hold
        for worker, last in list(self._heard.items()):
            rank, silent = self._members.rank_of(worker), now - last
            if rank in self._members.lost:
                continue
            stalled, what = silent >= self._limit, ""
            if stalled != (worker in self._reported):
                self._reported ^= {worker}
                what = f"is silent for {silent:.1f} s" if stalled else "is back"
            if stalled and self._drop and self._wait_no_longer(worker):
                what = f"is silent for {silent:.1f} s and is dropped: what it had not committed goes to the others"
            if what:
                self._say(f"WARNING: {self._name(rank)} {what}, at step {self._role.center.steps}")

    def _wait_no_longer(self, worker: int) -> bool:
        end = self._role.end
        if worker in end.silent or len({*end.lost, *end.silent, worker}) == self._role.count:
            return False  # the last one is waited for
        self._role.center.worker_lost(worker)
        end.stop_waiting_for(worker)
        return True


def leave_behind(comm: MPI.Intracomm, role: Role, members: Membership, outlives_loss: bool) -> MPI.Intracomm:
    """Go on without the workers that do not answer; collective over the others. Returns their communicator.

    Args:
        comm: with all that are not known to be dead.
        role: of this rank.
        members: who is alive; the hung ones are told to it.
        outlives_loss: whether ranks may die meanwhile.
    """
    if comm.size != role.count + 1:  # it was done before, or there is nobody else
        return comm
    try:
        if role.serves:
            left = _tell_who_goes_on(comm, role, outlives_loss)
        else:
            told = np.empty(comm.size + 1, np.int64)
            wait_until(comm.Irecv(told, 0, _LEFT).Test)
            left = told[1:][: told[0]].tolist()
        if len(left) == comm.size:
            return comm
        # Not Create_group: Open MPI 5.0 refuses it where a rank outside of the group has died.
        living = MPI.Intracomm.Create_from_group(comm.Get_group().Incl(left), "agnmpi.living")
    except MPI.Exception:
        if not outlives_loss:
            raise
        return comm  # another rank has died just now: the next step finds out
    members.left_behind([members.ranks[rank] for rank in left])
    return living


def _tell_who_goes_on(comm: MPI.Intracomm, role: Role, outlives_loss: bool) -> list[int]:
    assert isinstance(role, CenterRole)
    gone = {*role.end.silent, *role.end.lost}
    left = [0] + [worker + 1 for worker in range(role.count) if worker not in gone]
    for rank in left[1:]:
        try:
            wait_until(comm.Isend(np.array([len(left), *left]), rank, _LEFT).Test)
        except MPI.Exception:  # this one has died just now; the others are waiting for the message
            if not outlives_loss:
                raise
    return left
