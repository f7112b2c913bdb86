"""Roles from a communicator: which ranks serve and which train, and what connects them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array, bring, empty_like, full_like, namespace, to_host
from ..core.center import Center
from ..core.ends import Apply, WorkerEnd
from ..core.messages import OK, SAVE, Commit, Reply
from ..core.optimizers import Optimizer
from ..core.params import parts
from ..core.rules import Rule
from ..core.worker import Worker
from ..recovery.failover import Failover
from ..transport.local import LocalCenter
from ..transport.sharded import ShardedWorker
from ..transport.staging import make_wire
from .roles import Role
from .setup import Setup, survives

Observe = Callable[[Commit, Array], None]
Record = Callable[[Commit, Reply], None]


def connect(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    center_optimizer: Optimizer | None = None,
    setup: Setup = Setup(),  # noqa: B008
    observe: Observe | None = None,
    record: Record | None = None,
) -> Role:
    """Give this rank its part; collective over `comm`, which must be ours (duplicated).

    `x`: (n,) parameters of this rank, moved in place; rank 0's are the center's. `observe(commit, c)` is called
    after each applied commit where the center is applied (every rank with transport allreduce), `record(commit,
    reply)` after each message that a center serves, whatever it asks.
    """
    if setup.transport == "allreduce":
        return _collective(comm, rule, x, optimizer, center_optimizer, setup, observe)
    if setup.transport == "local":
        c = x.copy()
        center = Center(rule, c, setup.workers, center_optimizer)
        center.now = time.monotonic if setup.dylu else None
        apply = _apply(center, observe, record)
        local = LocalCenter(c, setup.workers, apply)
        copies = [x if i == 0 else x.copy() for i in range(setup.workers)]
        workers = [Worker(mine, rule, optimizer, local.worker_end(i), i) for i, mine in enumerate(copies)]
        return Role(center, workers, setup.workers, end=local, apply=apply)
    if comm.rank >= setup.centers:
        make = partial(_successor, rule, center_optimizer, setup, observe, record)
        return _worker(comm, rule, x, optimizer, setup, make)
    return _center(comm, rule, x, center_optimizer, setup, observe, record)


def _apply(center: Center, observe: Observe | None, record: Record | None = None) -> Apply:
    def apply(commit: Commit, c: Array) -> Reply:
        reply = center.apply(commit, c)
        if observe is not None and commit.payload is not None and reply.status == OK:
            observe(commit, c)
            # If it has saved c, this worker hears of it at once, and saves what it is then.
            reply = reply._replace(checkpoint=center.checkpoint)
        if record is not None:
            record(commit, reply)
        return reply

    return apply


def _booked(center: Center, end: Any, observe: Observe | None) -> Apply:
    """Accumulate: the commits are summed already; count them."""
    in_a_row = 0  # refused since the last good commit

    def apply(commit: Commit, c: Array) -> Reply:
        nonlocal in_a_row
        if commit.requests & SAVE:
            return center.apply(commit, c)
        refused = end.refused
        in_a_row = 0 if commit.commits else in_a_row + refused - center.refused
        center.refused = refused
        if in_a_row >= center.patience:
            raise RuntimeError(f"{in_a_row} commits in a row were refused: they hold NaN or infinity")
        center.clock += commit.commits
        center.steps += commit.steps
        center.staleness_sum, center.staleness_max = end.staleness
        if observe is not None:
            observe(commit, c)
        return Reply(center.clock)

    return apply


def _group(comm: MPI.Comm, center: int, centers: int) -> MPI.Comm:
    """The communicator of a center (rank 0) and all workers; with several centers the first is last in the others'."""
    if centers == 1:
        return comm
    ranks = [center, *range(centers, comm.size), *([0] if center else [])]
    group = comm.Get_group().Incl(ranks)
    made: MPI.Comm = comm.Create_group(group, center)  # type: ignore[attr-defined]
    return made


def _worker_end(comm: MPI.Comm, like: Array, setup: Setup) -> WorkerEnd:
    if setup.transport == "p2p":
        from ..transport.p2p import P2PWorker

        return P2PWorker(comm, make_wire(like, setup.wire), survives(setup))
    if setup.use_locking:
        from ..transport.rma import RMAWorker

        return RMAWorker(comm, like, make_wire(like, setup.wire))
    from ..transport.accumulate import AccumulateWorker

    return AccumulateWorker(comm, like, make_wire(like, "staged"))  # Open MPI refuses device buffers in Accumulate


def _worker(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    setup: Setup,
    make: Callable[[MPI.Comm, Array, Worker], Role],
) -> Role:
    spans, index = list(parts(x.size, setup.centers)), comm.rank - setup.centers
    ends = [_worker_end(_group(comm, i, setup.centers), x[span], setup) for i, span in enumerate(spans)]
    end = ends[0] if len(ends) == 1 else ShardedWorker(ends, spans)
    worker = Worker(x, rule, optimizer, end, index, setup.overlap, double_buffer=survives(setup))
    count = comm.size - setup.centers
    role = Role(Center(rule, x[:0], count), [worker], count)  # only the center's counts are of use here
    if survives(setup):
        role.failover = Failover(comm, role, partial(_worker_end, like=x, setup=setup), make)
    return role


def _successor(
    rule: Rule,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
    record: Record | None,
    comm: MPI.Comm,
    c: Array,
    worker: Worker,
) -> Role:
    """The part of a worker that takes the place of a lost center; a sole survivor goes on within its own process."""
    if comm.size == 1 or setup.center_device == "gpu":
        c = bring(c, worker.x)
    if comm.size > 1:
        return _center(comm, rule, c, center_optimizer, setup, observe, record)
    c = c.copy()
    center = Center(rule, c, 1, center_optimizer)
    apply = _apply(center, observe, record)
    return Role(center, [worker], 1, end=LocalCenter(c, 1, apply), apply=apply)


def _center(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
    record: Record | None,
) -> Role:
    centers: MPI.Comm | None = None
    whole: Array | None = None
    spans, count = list(parts(x.size, setup.centers)), comm.size - setup.centers
    if setup.center_device != "gpu":
        x = to_host(x)
    c = full_like(x, x)
    if setup.centers > 1:
        whole = full_like(to_host(x), to_host(x))
        centers = comm.Create_group(comm.Get_group().Incl(list(range(setup.centers))))  # type: ignore[attr-defined]
        centers.Bcast(whole, 0)  # rank 0's values count
        c = empty_like(x[spans[comm.rank]])
        c[...] = namespace(c).asarray(whole[spans[comm.rank]])
    center = Center(rule, c, count, center_optimizer)
    center.now = time.monotonic if setup.dylu else None
    mine = _group(comm, comm.rank, setup.centers)
    end: Any
    if setup.transport == "p2p":
        from ..transport.p2p import P2PCenter

        end = P2PCenter(mine, c, setup.slots, setup.wire)
        center.on_block = end.move_on
    elif setup.use_locking:
        from ..transport.rma import RMACenter

        end = RMACenter(mine, c)
        center.on_block = end.move_on
    else:
        from ..transport.accumulate import AccumulateCenter

        end = AccumulateCenter(mine, c)
    center.idle_workers_wait = setup.use_locking
    apply = _apply(center, observe, record) if setup.use_locking else _booked(center, end, observe)
    others: list[WorkerEnd] = []
    if comm.rank == 0 and whole is not None:
        rest = list(enumerate(spans))[1:]
        others = [_worker_end(_group(comm, i, setup.centers), whole[span], setup) for i, span in rest]
    role = Role(center, [], count, True, end, apply, spans, others, centers, whole)
    if survives(setup):
        center.replicates_state = True
        role.failover = Failover(comm, role)
    return role


def _collective(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
) -> Role:
    from ..transport.allreduce import AllreduceEnd

    wire = make_wire(x, "staged")  # Open MPI's nonblocking collectives take no device pointers
    buffer = wire.incoming(x)
    if comm.rank == 0 and buffer is not x:
        buffer[...] = to_host(x)
    comm.Bcast(buffer, 0)
    wire.arrived(x, slice(0, x.size))
    wire.settle(x)
    center = Center(rule, c := full_like(x, x), comm.size, center_optimizer)
    end = AllreduceEnd(comm, c, _apply(center, observe), wire)
    worker = Worker(x, rule, optimizer, end, comm.rank, setup.overlap)
    return Role(center, [worker], comm.size)
