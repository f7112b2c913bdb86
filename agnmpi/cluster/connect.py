"""Roles from a communicator: which ranks serve and which train, and what connects them."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from mpi4py import MPI

from ..arrays.backend import Array, bring, full_like, to_host
from ..core.center import Center
from ..core.ends import Apply, CenterEnd, WorkerEnd
from ..core.messages import OK, Commit, Reply
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.params import parts
from ..core.rules import Rule
from ..core.worker import Worker
from ..transport.chunks import bcast_in_pieces
from ..transport.local import LocalCenter
from ..transport.sharded import ShardedWorker
from ..transport.staging import make_wire
from .roles import CenterRole, LocalRole, PeerRole, Role, ShardRole, WorkerRole
from .setup import Setup


class Connector(NamedTuple):
    """Builds the roles of a session; the same on every rank.

    Args:
        rule: of exchange.
        optimizer: of the workers; None if the caller moves x.
        center_optimizer: None adds.
        setup: how they exchange.
        observer: of events on this rank.
    """

    rule: Rule
    optimizer: Optimizer | None = None
    center_optimizer: Optimizer | None = None
    setup: Setup = Setup()
    observer: Observer = Observer()

    def connect(self, comm: MPI.Comm, x: Array) -> Role:
        """Give this rank its role; collective over `comm`, which must be ours (duplicated).

        Args:
            comm: rank 0, or the first ranks, serve, where any serves.
            x: (n,) parameters of this rank, moved in place; rank 0's are the center's.
        """
        transport = self.setup.transport
        if transport.capabilities.together:
            return self._peer(comm, x)
        if not transport.capabilities.center_ranks:
            return self._local(x)
        if comm.rank >= transport.centers:
            return self._worker(comm, x)
        return self._shard(comm, x) if transport.centers > 1 else self.center(comm, x)

    def worker_end(self, comm: MPI.Comm, like: Array) -> WorkerEnd:
        """The end of a worker of the center that is rank 0 of `comm`; `like`: a vector like what it exchanges (n,)."""
        transport = self.setup.transport
        assert transport.make_worker is not None
        return transport.make_worker(comm, like, transport)

    def center(self, comm: MPI.Comm, x: Array) -> CenterRole:
        """The role of the center, rank 0 of `comm`, which begins from `x` (n,)."""
        x = x if self.setup.transport.center_device == "gpu" else to_host(x)
        center, end, apply = self._serving(comm, full_like(x, x), comm.size - 1)
        return CenterRole(center, comm.size - 1, end, apply, self.observer, self._grants_work)

    def alone(self, c: Array, worker: Worker) -> LocalRole:
        """The role of a sole survivor: it goes on training, from `c` (n,), within its own process."""
        c = full_like(worker.x, bring(c, worker.x))
        center = self._state(c, 1)
        return LocalRole(center, [worker], 1, LocalCenter(c, 1, self._apply(center)))

    @property
    def _grants_work(self) -> bool:
        return self.setup.transport.capabilities.single_commits

    def _state(self, like: Array, workers: int) -> Center:
        center = Center(self.rule, like, workers, self.center_optimizer)
        center.now = time.monotonic if self.setup.dylu else None
        center.on_given_up = self.observer.given_up
        return center

    def _serving(self, comm: MPI.Comm, c: Array, workers: int) -> tuple[Center, CenterEnd, Apply]:
        """A center that serves `c` at rank 0 of `comm`."""
        transport = self.setup.transport
        assert transport.make_center is not None
        center, end = self._state(c, workers), transport.make_center(comm, c, transport)
        center.on_block = end.move_on
        center.idle_workers_wait = self._grants_work
        center.replicates_state = transport.replicates_state
        return center, end, self._apply(center) if self._grants_work else self._count(center, end)

    def _apply(self, center: Center) -> Apply:
        """Processes a message, and calls the observer."""
        observer = self.observer

        def apply(commit: Commit, c: Array) -> Reply | None:
            reply = center.apply(commit, c)
            if reply is None:
                return None
            if commit.payload is not None and reply.status == OK:
                observer.committed(commit, c)
                # If it has saved c, this worker's reply says so, and it saves its state of this moment.
                if reply.checkpoint != center.checkpoint:
                    reply = reply._replace(checkpoint=center.checkpoint)
            observer.served(commit, reply)
            return reply

        return apply

    def _count(self, center: Center, end: CenterEnd) -> Apply:
        """Where the workers sum into c themselves: update the counts."""
        in_a_row = 0  # refused since the last good commit

        def apply(commit: Commit, c: Array) -> Reply | None:
            nonlocal in_a_row
            summed = end.summed
            in_a_row = 0 if commit.commits else in_a_row + summed.refused - center.refused
            if in_a_row >= center.patience:
                raise RuntimeError(f"{in_a_row} commits in a row were refused: they hold NaN or infinity")
            center.refused, center.staleness_sum, center.staleness_max = summed
            center.clock += commit.commits
            center.steps += commit.steps
            self.observer.committed(commit, c)
            return Reply(center.clock)

        return apply

    def _local(self, x: Array) -> LocalRole:
        c, count = x.copy(), self.setup.transport.workers
        center = self._state(c, count)
        end = LocalCenter(c, count, self._apply(center))
        copies = [x if i == 0 else x.copy() for i in range(count)]
        workers = [Worker(copy, self.rule, self.optimizer, end.worker_end(i), i) for i, copy in enumerate(copies)]
        return LocalRole(center, workers, count, end)

    def _worker(self, comm: MPI.Comm, x: Array) -> WorkerRole:
        transport = self.setup.transport
        spans, index = list(parts(x.size, transport.centers)), comm.rank - transport.centers
        ends = []
        for i, span in enumerate(spans):
            ends.append(self.worker_end(_group(comm, i, transport.centers), x[span]))
        end = ends[0] if len(ends) == 1 else ShardedWorker(ends, spans)
        worker = Worker(
            x, self.rule, self.optimizer, end, index, self.setup.overlap, double_buffer=transport.replicates_state
        )
        count = comm.size - transport.centers
        return WorkerRole(Center(self.rule, x[:0], count), [worker], count)  # the center's state is on another rank

    def _shard(self, comm: MPI.Comm, x: Array) -> ShardRole:
        centers, count = self.setup.transport.centers, comm.size - self.setup.transport.centers
        spans = list(parts(x.size, centers))
        whole = full_like(to_host(x), to_host(x))
        ranks = _subset(comm, range(centers))
        bcast_in_pieces(ranks, whole)  # rank 0's values count
        block = whole[spans[comm.rank]]
        like = block if self.setup.transport.center_device != "gpu" else x[spans[comm.rank]]
        c = full_like(like, bring(block, like))
        center, end, apply = self._serving(_group(comm, comm.rank, centers), c, count)
        others = []
        if comm.rank == 0:
            for i, span in list(enumerate(spans))[1:]:
                others.append(self.worker_end(_group(comm, i, centers), whole[span]))
        return ShardRole(
            center, count, end, apply, self.observer, self._grants_work,
            centers=ranks, whole=whole, spans=spans, others=others,
        )  # fmt: skip

    def _peer(self, comm: MPI.Comm, x: Array) -> PeerRole:
        wire = make_wire(x, "staged")  # Open MPI's nonblocking collectives take no device pointers
        buffer = wire.incoming(x)
        if comm.rank == 0 and buffer is not x:
            buffer[...] = to_host(x)
        bcast_in_pieces(comm, buffer[: x.size])
        wire.arrived(x, slice(0, x.size))
        wire.settle(x)
        center = Center(self.rule, c := full_like(x, x), comm.size, self.center_optimizer)
        make_peer = self.setup.transport.make_peer
        assert make_peer is not None
        end = make_peer(comm, c, self._apply(center))
        worker = Worker(x, self.rule, self.optimizer, end, comm.rank, self.setup.overlap)
        return PeerRole(center, [worker], comm.size, end)


def connect(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None = None,
    center_optimizer: Optimizer | None = None,
    setup: Setup = Setup(),  # noqa: B008
    observer: Observer = Observer(),  # noqa: B008
) -> Role:
    """Give this rank its role, without fail-over; see `Connector.connect`."""
    return Connector(rule, optimizer, center_optimizer, setup, observer).connect(comm, x)


def _group(comm: MPI.Comm, center: int, centers: int) -> MPI.Comm:
    """The communicator of a center (rank 0) and all workers; with several centers the first is last in the others'."""
    if centers == 1:
        return comm
    return _subset(comm, [center, *range(centers, comm.size), *([0] if center else [])], center)


def _subset(comm: MPI.Comm, ranks: Sequence[int], tag: int = 0) -> MPI.Comm:
    """A communicator of `ranks`, in this order; collective over these alone, apart from others by `tag`."""
    everyone = comm.Get_group()
    group = everyone.Incl(list(ranks))
    subset: MPI.Comm = comm.Create_group(group, tag)  # type: ignore[attr-defined]
    group.Free()
    everyone.Free()
    return subset
