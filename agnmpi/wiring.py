"""Roles from a communicator: which ranks serve and which train, and what connects them."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mpi4py import MPI

from .agree import ConfigError
from .backend import Array, bring, empty_like, full_like, namespace, to_host
from .center import Center, serve
from .data import Leases, rounds, speed_proportional
from .failover import Failover
from .faults import fault_tolerant
from .optimizers import Optimizer
from .params import parts
from .rules import Rule
from .transport.base import OK, SAVE, Apply, Capabilities, CenterEnd, Commit, Handle, Reply, WorkerEnd
from .transport.local import LocalCenter, LocalWorker
from .transport.sharded import ShardedWorker
from .transport.wire import make_wire
from .waiting import finish
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


class Member:
    """A rank's part: a center (or a block of it) to serve, or workers to drive (several in one process alone).

    `center`: the center's counts where they are known; `count`: number of workers; `end`: the center's end, where
    this rank has it; `others`: at rank 0, ends by which it reads the other centers' blocks; `centers`: communicator of
    the center ranks; `failover`: where the workers outlive the center.
    """

    failover: Failover | None = None

    def __init__(
        self,
        center: Center,
        workers: list[Worker],
        count: int,
        serves: bool = False,
        end: CenterEnd | None = None,
        apply: Apply | None = None,
        spans: Sequence[slice] = (),
        others: Sequence[WorkerEnd] = (),
        centers: MPI.Comm | None = None,
        whole: Array | None = None,
    ) -> None:
        self.center, self.workers, self.count, self.serves = center, workers, count, serves
        self.end, self._apply = end, apply
        self._spans, self._others, self._centers, self._whole = spans, others, centers, whole
        self._asked: dict[int, tuple[int, Handle]] = {}  # by other center: the number asked for last
        self._copied: list[Handle] = []  # pulls of the snapshot begun last
        self._resumed: Mapping[str, Any] | None = None
        self.first = centers is None or centers.rank == 0  # whether this center grants the work
        self.session = 0  # sessions begun; the last with these:
        self.total: int | None = None
        self.period = 1

    def resume(self, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Go on, in the next session, from a checkpoint: whole vectors and the center's facts; on every rank.

        Raises ValueError if the checkpoint is of another center optimizer.
        """
        self._resumed = facts
        for worker in self.workers:
            worker.sequence = max(worker.sequence, *facts["applied"], 0)  # what is applied is told from what will be
        if self.end is not None:
            span = self._spans[self._centers.rank] if self._centers else slice(None)
            self.center.restore({name: x[span] for name, x in arrays.items()}, facts, self.end.c)
            if self._whole is not None:
                self._whole[...] = arrays["c"]
            if hasattr(self.end, "resume"):
                stale = self.center.staleness_sum, self.center.staleness_max
                self.end.resume(self.center.clock, self.center.steps, stale, self.center.refused)
        elif self.center.rule.collective:
            end: Any = self.workers[0].end
            self.center.restore(arrays, facts, end.c)
            end.clock, end.steps = self.center.clock, self.center.steps

    def begin(self, total: int | None, period: int) -> None:
        """Lay out the work of a session: `total` steps over all workers (None: no end), λ = `period`; collective."""
        resumed, self._resumed = self._resumed, None
        self.session, self.total, self.period = self.session + 1, total, period
        self.center.session = self.session
        pace = None if self.center.now is None else speed_proportional(period, self.center.now)
        leases = Leases(total, period, pace)
        if resumed:
            done = int(resumed["steps"])
            leases.restore(resumed["leases"] or {"next": done, "free": [], "committed": done})
        if self.center.rule.collective:
            (worker,) = self.workers
            collective: Any = worker.end
            work = rounds(total, period, worker.index, self.count, leases.next, leases.free)
            collective.begin(total, work)
        elif self.end is not None and self.first and not hasattr(self.end, "begin"):
            self.center.leases = leases
        for end in self._ends():
            if not self.center.rule.collective and hasattr(end, "begin"):
                end.begin(total, period, leases.next)  # serverless: a lease is a counter
        for worker in self.workers:
            worker.total, worker.session = total, self.session
        if self.end is not None and not self.serves:
            self.end.open()

    def _ends(self) -> list[Any]:
        """All ends of this rank, in the order in which the centers come."""
        mine: list[Any] = [] if self.end is None else [self.end]
        for worker in self.workers:
            end: Any = worker.end
            mine += end.ends if isinstance(end, ShardedWorker) else [end]
        return mine + list(self._others)

    def apply(self, commit: Commit, c: Array) -> Reply:
        """What a message does at this center."""
        assert self._apply is not None
        return self._apply(commit, c)

    def serve(self, on_turn: Callable[[], None] | None = None) -> None:
        """Serve the workers until all have left, and share the final center among center ranks; on these only."""
        assert self.end is not None
        assert self._apply is not None
        serve(self.end, self._apply, on_turn)
        if self._whole is None or self._centers is None:
            return
        if self.first:
            # Before the farewells: what comes for one would else be taken for another.
            for handle in [*self._copied, *(handle for _, handle in self._asked.values())]:
                handle.wait()
            farewells = [end.leave(None, self._whole[span]) for end, span in zip(self._others, self._spans[1:])]
            for farewell in farewells:
                farewell.wait()
            self._whole[self._spans[0]] = to_host(self.end.c)
        finish(self._centers.Ibcast(self._whole, 0).Test)

    def save_others(self, steps: int) -> None:
        """At rank 0: have the other centers save their blocks, too, for the checkpoint after `steps` steps.

        A center that has not answered yet is asked later, for the newest alone: call it again with the same number.
        """
        for i, end in enumerate(self._others):
            before = self._asked.get(i)
            if before is None or (before[0] < steps and before[1].test()):
                self._asked[i] = steps, end.exchange(Commit(self.count, wants=SAVE, first=steps), None)

    def snapshot(self) -> Callable[[], Array | None]:
        """Begin to copy the center variable; call what is returned, now and then, until it gives the copy (n,)."""
        if self._whole is None:
            copy = to_host(self.c).copy()
            return lambda: copy
        whole: Array = empty_like(self._whole)
        assert self.end is not None
        whole[self._spans[0]] = to_host(self.end.c)
        self._copied = handles = [end.pull(whole[span]) for end, span in zip(self._others, self._spans[1:])]
        return lambda: whole if sum([handle.test() for handle in handles]) == len(handles) else None

    @property
    def c(self) -> Array:
        """(n,) the center variable, where this rank holds it whole; else as last pulled, or after the session."""
        if self._whole is not None:
            return self._whole
        if self.end is not None:
            return self.end.c
        end: Any = self.workers[0].end
        c: Array = getattr(end, "c", self.workers[0].o)
        return c

    def close(self) -> None:
        """Free what the ends hold; collective."""
        for end in self._ends():
            end.close()
        if self._centers is not None:
            self._centers.Free()


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
