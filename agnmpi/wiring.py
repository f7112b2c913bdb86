"""Roles from a communicator: which ranks serve and which train, and what connects them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from mpi4py import MPI

from .agree import ConfigError
from .backend import Array, bring, empty_like, full_like, namespace, to_host
from .center import Center
from .failover import Failover
from .faults import fault_tolerant
from .member import Member
from .optimizers import Optimizer
from .params import parts
from .rules import Rule
from .transport.base import OK, SAVE, Apply, Capabilities, Commit, Reply, WorkerEnd
from .transport.local import LocalCenter, LocalWorker
from .transport.sharded import ShardedWorker
from .transport.wire import make_wire
from .worker import Worker

Observe = Callable[[Commit, Array], None]
Record = Callable[[Commit, Reply], None]


class Setup(NamedTuple):
    """How workers and centers exchange.

    `use_locking`: False sums commits without a server (transport rma); `centers`: k, ranks 0 … k−1 hold a block
    each; `wire`: "staged" or "direct", of vectors on a device; `center_device`: "cpu", or "gpu" where rank 0's
    parameters lie on one; `slots`: message vectors at a p2p center; `workers`: for transport local; `dylu`: λ_k in
    proportion to the workers' speeds, by this machine's clock.
    """

    transport: str = "p2p"
    overlap: bool = False
    use_locking: bool = True
    centers: int = 1
    wire: str = "staged"
    center_device: str = "cpu"
    slots: int = 4
    workers: int = 1
    dylu: bool = False

    def count(self, size: int) -> int:
        """Number of workers n in a world of `size` ranks."""
        return size - self.centers if self.serves else self.workers if self.transport == "local" else size

    @property
    def serves(self) -> bool:
        """Whether center ranks serve and do not train."""
        return self.transport in ("p2p", "rma")


def capabilities(setup: Setup) -> Capabilities:
    """What the ends of `setup` give."""
    if setup.transport == "p2p":
        from .transport.p2p import P2PWorker

        return P2PWorker.capabilities
    if setup.transport == "rma" and setup.use_locking:
        from .transport.rma import RMAWorker

        return RMAWorker.capabilities
    if setup.transport == "rma":
        from .transport.serverless import SumWorker

        return SumWorker.capabilities
    if setup.transport == "collective":
        from .transport.collective import CollectiveEnd

        return CollectiveEnd.capabilities
    if setup.transport == "local":
        return LocalWorker.capabilities
    raise ConfigError(f"unknown transport {setup.transport!r}: p2p, rma, collective or local")


def check_fit(
    rule: Rule, setup: Setup, comm: MPI.Comm, optimizer: Optimizer | None, center_optimizer: Optimizer | None
) -> None:
    """Refuse a rule on a transport, or a world, that lacks what the rule needs."""
    given, transport = capabilities(setup), setup.transport
    if rule.collective == given.server:
        raise ConfigError(f"rule {rule.name} cannot use transport {transport!r}; use {rule.transport!r}, or 'auto'")
    if not setup.use_locking and transport != "rma":
        raise ConfigError(f"use_locking=False needs transport 'rma'; transport {transport!r} applies whole commits")
    if not given.weights and rule.weighs:
        raise ConfigError(f"rule {rule.name} weighs commits, which use_locking=False cannot; leave use_locking on")
    if not given.center_optimizer and (center_optimizer is not None or rule.accumulates):
        raise ConfigError("use_locking=False adds commits as they are: no center optimizer; leave use_locking on")
    if setup.dylu and (rule.collective or not setup.use_locking):
        raise ConfigError("dylu needs a center that grants the work: not a collective rule, nor use_locking=False")
    if setup.centers < 1:
        raise ConfigError(f"centers must be at least 1, not {setup.centers}")
    if setup.centers > 1 and not setup.serves:
        raise ConfigError(f"centers = {setup.centers} needs transport p2p or rma; {transport!r} has no center ranks")
    if setup.serves and comm.size < setup.centers + 1:
        ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
        raise ConfigError(
            f"rule {rule.name} needs {'a center' if setup.centers == 1 else f'{setup.centers} centers'} and at least "
            f"one worker, but the world has {ranks}: start it with mpiexec -n {setup.centers + 3} (or more), or train "
            "in one process with transport local"
        )
    if setup.center_device == "gpu" and transport != "p2p":
        raise ConfigError(f"a center on a GPU needs transport p2p, not {transport!r}: windows lie in host memory")
    if transport == "local" and comm.size > 1:
        raise ConfigError(f"transport local is one process, but mpiexec started {comm.size} ranks")
    if optimizer is None and rule.accumulates:
        raise ConfigError("variant 'gradient' needs the gradients: give an optimizer, or use 'displacement'")
    if setup.overlap and transport == "local":
        raise ConfigError("overlap has no meaning on transport local: its exchanges take no time")


def connect(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    center_optimizer: Optimizer | None = None,
    setup: Setup = Setup(),  # noqa: B008
    observe: Observe | None = None,
    record: Record | None = None,
) -> Member:
    """Give this rank its part; collective over `comm`, which must be ours (duplicated).

    `x`: (n,) parameters of this rank, moved in place; rank 0's are the center's. `observe(commit, c)` is called
    after each applied commit where the center is applied (every rank with transport collective), `record(commit,
    reply)` after each message that a center serves, whatever it asks.
    """
    if setup.transport == "collective":
        return _collective(comm, rule, x, optimizer, center_optimizer, setup, observe)
    if setup.transport == "local":
        c = x.copy()
        center = Center(rule, c, setup.workers, center_optimizer)
        center.now = time.monotonic if setup.dylu else None
        apply = _apply(center, observe, record)
        local = LocalCenter(c, setup.workers, apply)
        copies = [x if i == 0 else x.copy() for i in range(setup.workers)]
        workers = [Worker(mine, rule, optimizer, local.worker_end(i), i) for i, mine in enumerate(copies)]
        return Member(center, workers, setup.workers, end=local, apply=apply)
    if comm.rank >= setup.centers:
        make = partial(_successor, rule, center_optimizer, setup, observe, record)
        return _worker(comm, rule, x, optimizer, setup, make)
    return _center(comm, rule, x, center_optimizer, setup, observe, record)


def survives(setup: Setup) -> bool:
    """Whether workers and the center outlive each other: MPI says who has died, and messages are two-sided."""
    return setup.transport == "p2p" and setup.centers == 1 and fault_tolerant()


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
    """Serverless: the commits are summed already; count them."""
    in_a_row = 0  # refused since the last good commit

    def apply(commit: Commit, c: Array) -> Reply:
        nonlocal in_a_row
        if commit.wants & SAVE:
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
        from .transport.p2p import P2PWorker

        return P2PWorker(comm, make_wire(like, setup.wire))
    if setup.use_locking:
        from .transport.rma import RMAWorker

        return RMAWorker(comm, like, make_wire(like, setup.wire))
    from .transport.serverless import SumWorker

    return SumWorker(comm, like, make_wire(like, "staged"))  # Open MPI refuses device buffers in Accumulate


def _worker(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    setup: Setup,
    make: Callable[[MPI.Comm, Array, Worker], Member],
) -> Member:
    spans, index = list(parts(x.size, setup.centers)), comm.rank - setup.centers
    ends = [_worker_end(_group(comm, i, setup.centers), x[span], setup) for i, span in enumerate(spans)]
    end = ends[0] if len(ends) == 1 else ShardedWorker(ends, spans)
    worker = Worker(x, rule, optimizer, end, index, setup.overlap, keeps=survives(setup))
    count = comm.size - setup.centers
    member = Member(Center(rule, x[:0], count), [worker], count)  # only the center's counts are of use here
    if survives(setup):
        member.failover = Failover(comm, member, partial(_worker_end, like=x, setup=setup), make)
    return member


def _successor(
    rule: Rule,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
    record: Record | None,
    comm: MPI.Comm,
    c: Array,
    worker: Worker,
) -> Member:
    """The part of a worker that takes the place of a lost center; a sole survivor goes on within its own process."""
    if comm.size == 1 or setup.center_device == "gpu":
        c = bring(c, worker.x)
    if comm.size > 1:
        return _center(comm, rule, c, center_optimizer, setup, observe, record)
    c = c.copy()
    center = Center(rule, c, 1, center_optimizer)
    apply = _apply(center, observe, record)
    return Member(center, [worker], 1, end=LocalCenter(c, 1, apply), apply=apply)


def _center(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
    record: Record | None,
) -> Member:
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
        from .transport.p2p import P2PCenter

        end = P2PCenter(mine, c, setup.slots, setup.wire)
        center.between = end.move_on
    elif setup.use_locking:
        from .transport.rma import RMACenter

        end = RMACenter(mine, c)
        center.between = end.move_on
    else:
        from .transport.serverless import SumCenter

        end = SumCenter(mine, c)
    center.parks = setup.use_locking
    apply = _apply(center, observe, record) if setup.use_locking else _booked(center, end, observe)
    others: list[WorkerEnd] = []
    if comm.rank == 0 and whole is not None:
        rest = list(enumerate(spans))[1:]
        others = [_worker_end(_group(comm, i, setup.centers), whole[span], setup) for i, span in rest]
    member = Member(center, [], count, True, end, apply, spans, others, centers, whole)
    if survives(setup):
        center.tells = True
        member.failover = Failover(comm, member)
    return member


def _collective(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    center_optimizer: Optimizer | None,
    setup: Setup,
    observe: Observe | None,
) -> Member:
    from .transport.collective import CollectiveEnd

    wire = make_wire(x, "staged")  # Open MPI's nonblocking collectives take no device pointers
    buffer = wire.incoming(x)
    if comm.rank == 0 and buffer is not x:
        buffer[...] = to_host(x)
    comm.Bcast(buffer, 0)
    wire.arrived(x, slice(0, x.size))
    wire.settle(x)
    center = Center(rule, c := full_like(x, x), comm.size, center_optimizer)
    end = CollectiveEnd(comm, c, _apply(center, observe), wire)
    worker = Worker(x, rule, optimizer, end, comm.rank, setup.overlap)
    return Member(center, [worker], comm.size)
