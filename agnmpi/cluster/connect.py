"""Roles from a communicator: which ranks serve and which train, and what connects them."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mpi4py import MPI

from ..arrays.backend import Array, bring, full_like, to_host
from ..core.center import Center, SummedCenter
from ..core.ends import CenterEnd, WorkerEnd
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.params import parts
from ..core.rules import Rule
from ..core.worker import Worker
from ..transport.chunks import bcast_in_pieces
from ..transport.communication_thread import ThreadedEnd
from ..transport.composed import ShardedWorker, encode
from ..transport.local import LocalCenter
from ..transport.staging import make_wire
from .node import NodeEnd
from .role import Role
from .roles import CenterRole, LocalRole, NodeRole, PeerRole, ShardRole, WorkerRole
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
            comm: rank 0, or the ranks where the setup has placed centers, serve, where any serves.
            x: (n,) parameters of this rank, moved in place; rank 0's are the center's.
        """
        transport = self.setup.transport
        if transport.capabilities.together:
            return self._peer(comm, x)
        if not transport.capabilities.center_ranks:
            return self._local(x)
        if self.setup.nodes:
            return self._in_tree(comm, x)
        if comm.rank not in self.setup.center_ranks:
            return self._worker(comm, x)
        return self._shard(comm, x) if transport.centers > 1 else self.center(comm, x)

    def worker_end(self, comm: MPI.Comm, like: Array) -> WorkerEnd:
        """The end of a worker of the center that is rank 0 of `comm`; `like`: a vector like what it exchanges (n,)."""
        transport = self.setup.transport
        assert transport.make_worker is not None
        return transport.make_worker(comm, like, transport)

    def encoded(self, end: WorkerEnd, like: Array) -> WorkerEnd:
        """`end` with the encodings of the transport, for vectors like `like` (n,)."""
        return encode(end, like, self.setup.transport.encoding, self.setup.transport.pull_encoding)

    def threaded(self, end: WorkerEnd, like: Array) -> WorkerEnd:
        """`end` with its exchanges in a thread of their own, if the setup says so; `like`: as above."""
        return ThreadedEnd(end, like) if self.setup.threaded else end

    def center(self, comm: MPI.Comm, x: Array) -> CenterRole:
        """The role of the center, rank 0 of `comm`, which begins from `x` (n,)."""
        x = x if self.setup.transport.center_device == "gpu" else to_host(x)
        count = self.setup.transport.workers_among(comm.size)
        center, end = self._serving(comm, full_like(x, x), count)
        center.applied = [0] * (comm.size - 1)  # of spares, too
        return CenterRole(center, count, end, self._grants_work, range(comm.size - 1))

    def alone(self, c: Array, worker: Worker) -> LocalRole:
        """The role of a sole survivor: it goes on training, from `c` (n,), within its own process."""
        c = full_like(worker.x, bring(c, worker.x))
        center = self._state(c, 1)
        return LocalRole(center, [worker], 1, LocalCenter(c, 1, center.apply))

    @property
    def _grants_work(self) -> bool:
        return self.setup.transport.capabilities.single_commits

    def _state(self, like: Array, workers: int) -> Center:
        center = Center(self.rule, like, workers, self.center_optimizer, observer=self.observer)
        center.now = time.monotonic if self.setup.dylu else None
        return center

    def _serving(self, comm: MPI.Comm, c: Array, workers: int) -> tuple[Center, CenterEnd]:
        """A center that serves `c` at rank 0 of `comm`."""
        transport = self.setup.transport
        assert transport.make_center is not None
        end = transport.make_center(comm, c, transport)
        if not self._grants_work:
            return SummedCenter(self.rule, c, workers, end, self.observer), end
        center = self._state(c, workers)
        center.on_block = end.move_on
        center.idle_workers_wait = True
        center.replicates_state = transport.replicates_state
        return center, end

    def _local(self, x: Array) -> LocalRole:
        c, count = x.copy(), self.setup.transport.workers
        center = self._state(c, count)
        end = LocalCenter(c, count, center.apply, self.setup.transport.pull_encoding)
        workers = []
        for i, copy in enumerate([x, *(x.copy() for _ in range(count - 1))]):
            workers.append(Worker(copy, self.rule, self.optimizer, self.encoded(end.worker_end(i), copy), i))
        return LocalRole(center, workers, count, end)

    def _worker(self, comm: MPI.Comm, x: Array) -> WorkerRole:
        centers = self.setup.center_ranks
        spans, index = list(parts(x.size, len(centers))), comm.rank - sum(rank < comm.rank for rank in centers)
        ends, comms = [], []
        for i, span in enumerate(spans):
            comms.append(_group(comm, i, centers))
            ends.append(self.encoded(self.worker_end(comms[i], x[span]), x[span]))
        end = ends[0] if len(ends) == 1 else ShardedWorker(ends, spans)
        role = self._training(x, end, index, self.setup.transport.workers_among(comm.size))
        role.workers[0].spare = self.setup.is_spare(comm.rank, comm.size)
        role.comms = comms if len(ends) > 1 else []
        return role

    def _training(self, x: Array, end: WorkerEnd, index: int, count: int) -> WorkerRole:
        end, replicates_state = self.threaded(end, x), self.setup.transport.replicates_state
        worker = Worker(x, self.rule, self.optimizer, end, index, self.setup.overlap, replicates_state, self.setup.wait)
        return WorkerRole(Center(self.rule, x[:0], count), [worker], count)  # the center's state is on another rank

    def _in_tree(self, comm: MPI.Comm, x: Array) -> Role:
        """A rank's role where there are node centers: rank 0 serves these and the workers without one."""
        nodes, workers = self.setup.nodes, self.setup.workers(comm.size)
        n, direct = len(workers), len(workers) - sum(len(group) - 1 for group in nodes)
        top = self._numbered([*range(direct), *range(n, n + len(nodes))])
        ranks = [0, *workers[:direct], *(node for node, *_ in nodes)]
        mine = next((i for i, group in enumerate(nodes) if comm.rank in group), None)
        if mine is None:
            above = _subset(comm, ranks)
            role = top._root(above, x, n) if comm.rank == 0 else top._leaf(above, x, n)
            role.comms = [above]
            return role
        first = workers.index(nodes[mine][1])
        within = replace(self.setup.transport, encoding="float32", pull_encoding="float32")
        host = self._replace(setup=self.setup._replace(transport=within))
        host = host._numbered(range(first, first + len(nodes[mine]) - 1))
        below = _subset(comm, nodes[mine])
        if comm.rank != nodes[mine][0]:
            role = host._leaf(below, x, n)
            role.comms = [below]
            return role
        above, c = _subset(comm, ranks), full_like(to_host(x), to_host(x))
        center, end = host._serving(below, c, n)
        node = NodeEnd(end, top.encoded(top.worker_end(above, c), c), center, n + mine)
        center.on_block, center.patience = node.move_on, 1 << 62  # the center above counts what is refused
        role = NodeRole(center, n, node, numbers=host.setup.transport.numbers)
        role.comms = [below, above]
        return role

    def _numbered(self, numbers: Sequence[int]) -> "Connector":
        """For a center whose workers have these numbers."""
        transport = replace(self.setup.transport, numbers=tuple(numbers))
        return self._replace(setup=self.setup._replace(transport=transport))

    def _root(self, comm: MPI.Comm, x: Array, n: int) -> CenterRole:
        """The center of a tree of `n` workers, rank 0 of `comm`; its nodes have the numbers from n on."""
        x, numbers = x if self.setup.transport.center_device == "gpu" else to_host(x), self.setup.transport.numbers
        center, end = self._serving(comm, full_like(x, x), n)
        center.nodes = {number for number in numbers if number >= n}
        center.applied = [0] * (n + len(center.nodes))
        return CenterRole(center, n, end, numbers=numbers)

    def _leaf(self, comm: MPI.Comm, x: Array, n: int) -> WorkerRole:
        """A worker in a tree, of the center or node center that is rank 0 of `comm`."""
        end = self.encoded(self.worker_end(comm, x), x)
        return self._training(x, end, self.setup.transport.numbers[comm.rank - 1], n)

    def _shard(self, comm: MPI.Comm, x: Array) -> ShardRole:
        centers = self.setup.center_ranks
        spans, count, index = list(parts(x.size, len(centers))), comm.size - len(centers), centers.index(comm.rank)
        whole = full_like(to_host(x), to_host(x))
        ranks = _subset(comm, centers)
        bcast_in_pieces(ranks, whole)  # rank 0's values count
        block = whole[spans[index]]
        like = block if self.setup.transport.center_device != "gpu" else x[spans[index]]
        c = full_like(like, bring(block, like))
        connector = self._replace(rule=self.rule.of_block(spans[index], x.size))
        comms = [_group(comm, index, centers)]
        center, end = connector._serving(comms[0], c, count)
        others = []
        if comm.rank == 0:
            for i, span in list(enumerate(spans))[1:]:
                comms.append(_group(comm, i, centers))
                others.append(self.worker_end(comms[i], whole[span]))
        role = ShardRole(
            center, count, end, self._grants_work,
            centers=ranks, whole=whole, spans=spans, others=others,
        )  # fmt: skip
        role.comms = [*comms, ranks]
        return role

    def _peer(self, comm: MPI.Comm, x: Array) -> PeerRole:
        wire = make_wire(x, "staged")  # Open MPI's nonblocking collectives take no device pointers
        buffer = wire.incoming(x)
        if comm.rank == 0 and buffer is not x:
            buffer[...] = to_host(x)
        bcast_in_pieces(comm, buffer[: x.size])
        wire.arrived(x, slice(0, x.size))
        wire.settle(x)
        center = self._state(c := full_like(x, x), comm.size)
        make_peer = self.setup.transport.make_peer
        assert make_peer is not None
        end = make_peer(comm, c, center.apply)
        center.division = end.state
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


def _group(comm: MPI.Comm, index: int, centers: Sequence[int]) -> MPI.Comm:
    """The communicator of a center (rank 0) and all workers; with several centers the first is last in the others'."""
    if len(centers) == 1:
        return comm
    serve = set(centers)
    workers = [rank for rank in range(comm.size) if rank not in serve]
    return _subset(comm, [centers[index], *workers, *([centers[0]] if index else [])], index)


def _subset(comm: MPI.Comm, ranks: Sequence[int], tag: int = 0) -> MPI.Comm:
    """A communicator of `ranks`, in this order; collective over these alone, apart from others by `tag`."""
    everyone = comm.Get_group()
    group = everyone.Incl(list(ranks))
    subset: MPI.Comm = comm.Create_group(group, tag)  # type: ignore[attr-defined]
    group.Free()
    everyone.Free()
    return subset
