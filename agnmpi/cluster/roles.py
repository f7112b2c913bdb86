"""What a rank does in a session: it serves the center variable or a block of it, trains as a worker, or is a peer."""

from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, empty_like, host_copy, to_host
from ..core.backoff import wait_until
from ..core.center import Center, serve
from ..core.ends import CenterEnd, Handle, Summed, WorkerEnd, all_done
from ..core.leases import Leases, Shares
from ..core.worker import Worker
from ..transport.allreduce import AllreduceEnd
from ..transport.chunks import bcast_in_pieces, share_blocks
from ..transport.local import LocalCenter
from .node import NodeEnd
from .role import Arrays, Facts, Role


class WorkerRole(Role):
    """A worker of one or several center ranks."""


class HoldingRole(Role):
    """A role that holds the center variable, a block or a replica of it.

    Args:
        end: where it is held.
    """

    stores = True

    def __init__(self, center: Center, workers: Sequence[Worker], count: int, end: CenterEnd | AllreduceEnd) -> None:
        super().__init__(center, workers, count)
        self.end = end

    @property
    def c(self) -> Array:
        """(n,) the center variable, or what is held of it."""
        return self.end.c

    def resume(self, arrays: Arrays, facts: Facts) -> None:
        """As `Role.resume`; restores the center variable, the slots and the counts."""
        super().resume(arrays, facts)
        self.center.restore(arrays, facts, self.end.c)


class CenterRole(HoldingRole):
    """The rank that serves the center variable.

    Args:
        end: of the center.
        grants: whether this center grants the work; else the ends or another center do.
        numbers: of the workers that it serves, where they are not all.
    """

    serves = True
    end: CenterEnd

    def __init__(
        self, center: Center, count: int, end: CenterEnd, grants: bool = True, numbers: Sequence[int] = ()
    ) -> None:
        super().__init__(center, [], count, end)
        self._grants = grants
        self._numbers = numbers

    @property
    def at_work(self) -> int:
        """As `Role.at_work`."""
        return self.end.live

    @property
    def caveat(self) -> str:
        """Of this center's end."""
        return self.end.caveat

    def resume(self, arrays: Arrays, facts: Facts) -> None:
        """As `HoldingRole.resume`."""
        super().resume(arrays, facts)
        center = self.center
        summed = Summed(center.refused, center.staleness_sum, center.staleness_max, center.given_up)
        self.end.resume(center.clock, center.steps, summed)

    def start_from(self, x: Array) -> None:
        """As `Role.start_from`."""
        self.end.start_from(x)

    def _prepare(self, total: int | None, period: int, leases: Leases) -> None:
        if self._grants:
            self.center.leases = leases
        super()._prepare(total, period, leases)

    def admit(self, comm: MPI.Comm) -> int:
        """Take in a worker of another job, as `CenterEnd.admit`."""
        number = self.end.admit(comm)
        self._numbers = range(number + 1)
        self.center.applied.append(0)
        self.center.workers += 1
        return number

    def ends(self) -> list[WorkerEnd | CenterEnd]:
        """The center's end."""
        return [self.end]

    def serve(self) -> None:
        """Serve the workers until all have left."""
        serve(self.end, self.center.apply, self.center.observer.waiting)


class NodeRole(CenterRole):
    """A rank that serves the workers of its host, and is one worker of the center above."""

    end: NodeEnd
    stores = False

    def resume(self, arrays: Arrays, facts: Facts) -> None:
        """As `Role.resume`: what it serves comes from above."""
        Role.resume(self, arrays, facts)

    def start_from(self, x: Array) -> None:
        """As `Role.start_from`: likewise."""

    def _prepare(self, total: int | None, period: int, leases: Leases) -> None:
        self.center.leases = Shares(total, period)
        self.end.begin(total, period, leases)


class ShardRole(CenterRole):
    """A rank that serves a block of the center variable; rank 0 also reads the other blocks, and grants the work.

    Args:
        centers: communicator of the center ranks.
        whole: (n,) host memory for the whole center variable.
        spans: the block of each center rank.
        others: at rank 0, ends for reading the other centers' blocks.
    """

    def __init__(
        self, center: Center, count: int, end: CenterEnd, grants: bool, *,
        centers: MPI.Comm, whole: Array, spans: Sequence[slice], others: Sequence[WorkerEnd],
    ) -> None:  # fmt: skip
        super().__init__(center, count, end, grants and centers.rank == 0)
        self.centers = centers
        self._whole, self._spans, self._others = whole, spans, others
        self.before_leaving: Callable[[], None] | None = None  # called at the first center when its workers have left
        self._copied: list[Handle] = []  # pulls of the last copy

    @property
    def c(self) -> Array:
        """(n,) the center variable, after a session."""
        return self._whole

    @property
    def span(self) -> slice:
        """The block of this center."""
        return self._spans[self.centers.rank]

    def start_from(self, x: Array) -> None:
        """As `Role.start_from`."""
        if (changed := _bcast_changed(self.centers, x, self._whole)) is not None:
            self._whole[...] = changed
            self.end.start_from(self._whole[self.span])

    def ends(self) -> list[WorkerEnd | CenterEnd]:
        """The end of this center, and those for reading the others."""
        return [self.end, *self._others]

    def serve(self) -> None:
        """Serve the workers until all have left, and share the final center among the center ranks."""
        super().serve()
        if self.centers.rank == 0:
            if self.before_leaving is not None:
                self.before_leaving()
            # Before leaving: else a reply to one exchange would be received by another.
            for handle in self._copied:
                handle.wait()
            for handle in [end.leave(None, None) for end in self._others]:  # their blocks come below
                handle.wait()
        self._whole[self.span] = to_host(self.end.c)
        share_blocks(self.centers, [self._whole[span] for span in self._spans])

    def copy_center(self) -> Callable[[], Array | None]:
        """As `Role.copy_center`: the blocks are pulled, each is whole."""
        whole: Array = empty_like(self._whole)
        whole[self._spans[0]] = to_host(self.end.c)
        self._copied = handles = [end.pull(whole[span]) for end, span in zip(self._others, self._spans[1:])]
        return lambda: whole if all_done(handles) else None


class PeerRole(HoldingRole):
    """A rank that trains and exchanges with all others at the same time; it holds a replica of the center variable."""

    end: AllreduceEnd

    def resume(self, arrays: Arrays, facts: Facts) -> None:
        """As `HoldingRole.resume`, on every rank."""
        super().resume(arrays, facts)
        self.end.clock, self.end.steps = self.center.clock, self.center.steps

    def start_from(self, x: Array) -> None:
        """As `Role.start_from`."""
        if (changed := _bcast_changed(self.end.comm, x, self.c)) is not None:
            self.c[...] = bring(changed, self.c)


class LocalRole(HoldingRole):
    """Center and workers in this process."""

    end: LocalCenter

    def worker_end(self, worker: int = 0) -> WorkerEnd:
        """The end of a worker."""
        return self.end.worker_end(worker)

    def start_from(self, x: Array) -> None:
        """As `Role.start_from`."""
        self.end.start_from(x)

    def _prepare(self, total: int | None, period: int, leases: Leases) -> None:
        self.center.leases = leases
        self.end.open()


def _bcast_changed(comm: MPI.Comm, x: Array, c: Array) -> Array | None:
    """Rank 0's `x` (n,) on the host of every rank, None if it equals rank 0's `c`; collective."""
    changed = np.array([comm.rank == 0 and not np.array_equal(to_host(x), to_host(c))])
    wait_until(comm.Ibcast(changed, 0).Test)
    if not changed[0]:
        return None
    whole = host_copy(x)
    bcast_in_pieces(comm, whole)
    return whole
