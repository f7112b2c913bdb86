"""Roles from a communicator, what a world must offer, and the wiring of ends, center and workers."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from mpi4py import MPI

from .agree import ConfigError, agree, allgather
from .backend import Array, full_like, on_host, to_host
from .center import Center, serve
from .data import Leases, rounds
from .optimizers import Optimizer
from .params import Layout
from .rules import Rule
from .transport.base import Apply, CenterEnd, Commit, Reply, WorkerEnd
from .transport.local import LocalCenter
from .transport.wire import Direct, Staged
from .version import __version__
from .worker import Worker

Observe = Callable[[Commit, Array], None]
Record = Callable[[Commit, Reply], None]


class Place(NamedTuple):
    """A rank's place among the ranks of its node."""

    host: str
    local_size: int
    worker_index: int  # among the workers of this node
    threads: int  # BLAS threads that leave each busy rank its cores


def place(comm: MPI.Comm, trains: bool) -> Place:
    """Find this rank's place; collective. `trains`: whether this rank computes (a center hardly does)."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        cores = sorted(os.sched_getaffinity(0))
        seen = [json.loads(text) for text in allgather(node, json.dumps([trains, cores]))]
        index = sum(busy for busy, _ in seen[: node.rank])
        sharing = sum(busy for busy, theirs in seen if theirs == cores)
        threads = max(1, len(cores) // max(sharing, 1)) if trains else 1
        return Place(MPI.Get_processor_name(), node.size, index, threads)
    finally:
        node.Free()


def limit_blas(threads: int) -> None:
    """Give BLAS `threads` threads, unless the environment already says how many."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads)


def blas_threads() -> int:
    """Count the threads that BLAS uses here."""
    import threadpoolctl

    return max((int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info()), default=1)


def check_world(comm: MPI.Comm, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a world of one rank that a launcher meant to be one of many."""
    if MPI.COMM_WORLD.size > 1 or comm.size > 1:
        return
    library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if environment.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(
                f"the launcher started {environment[name]} ranks, but each is a world of its own: mpiexec is of "
                f"another MPI than mpi4py's ({library}); use the mpiexec of the same environment"
            )
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
        raise ConfigError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but each is a world of its own: {library} "
            "does not speak what srun offered; pass srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI), or use mpiexec"
        )


def agree_on_model(comm: MPI.Comm, layout: Layout, facts: Mapping[str, str]) -> None:
    """Refuse, on all ranks, parameters or `facts` that differ between them."""
    shapes = {f"parameter {name!r}": f"shape {shape}" for name, shape in zip(layout.names, layout.shapes)}
    agree(comm, {"agnmpi version": __version__, **facts, "dtype": layout.dtype, **shapes})
    agree(comm, {"order of parameters": ", ".join(layout.names)})


def check_fit(rule: Rule, transport: str, comm: MPI.Comm, optimizer: Optimizer | None, overlap: bool) -> None:
    """Refuse a rule on a transport, or a world, that lacks what the rule needs."""
    if transport not in ("p2p", "collective", "local"):
        raise ConfigError(f"unknown transport {transport!r}: p2p, collective or local")
    if rule.collective != (transport == "collective"):
        raise ConfigError(f"rule {rule.name} cannot use transport {transport!r}; use {rule.transport!r}, or 'auto'")
    if transport == "p2p" and comm.size < 2:
        raise ConfigError(
            f"rule {rule.name} needs a center and at least one worker, but the world has 1 rank: start it with "
            "mpiexec -n 4 (or more), or train in one process with transport local"
        )
    if transport == "local" and comm.size > 1:
        raise ConfigError(f"transport local is one process, but mpiexec started {comm.size} ranks")
    if optimizer is None and rule.accumulates:
        raise ConfigError("variant 'gradient' needs the gradients: give an optimizer, or use 'displacement'")
    if overlap and transport == "local":
        raise ConfigError("overlap has no meaning on transport local: its exchanges take no time")


def advice(rule: Rule, workers: int, period: int) -> list[str]:
    """What n/λ means for this run (arXiv:1710.02368, section 4, and DESIGN's own check); empty for other rules."""
    if rule.name != "agn":
        return []
    ratio = workers / period
    lines = [f"n/λ = {workers}/{period} = {ratio:.3g} (workers / communication period)"]
    if ratio > 2:
        lines.append(
            "WARNING: above 2 AGN becomes unstable: expect worse accuracy or divergence; "
            f"use a period of at least {-(-workers // 2)}, or fewer workers"
        )
    elif ratio < 0.8:
        lines.append(
            f"note: each round of commits moves the center by only {ratio:.3g} mean displacements, so progress "
            f"per sample is slow at first; a shorter period (about {max(1, workers)}) often learns more per sample"
        )
    return lines


class Member:
    """A rank's part: a center to serve, or workers to drive (more than one only in one process)."""

    def __init__(
        self, center: Center, center_end: CenterEnd | None, workers: list[Worker], apply: Apply, serves: bool
    ) -> None:
        self.center, self.center_end, self.workers = center, center_end, workers
        self.serves = serves  # a center rank, which serves and does not train
        self._apply = apply

    def begin(self, total: int | None, period: int) -> None:
        """Lay out the work of a session: `total` steps over all workers (None: no end), λ = `period`."""
        if self.center.rule.collective:
            (worker,) = self.workers
            end: Any = worker.end
            end.begin(total, rounds(total, period, worker.index, self.center.workers))
        else:
            self.center.leases = Leases(total, period)
        for worker in self.workers:
            worker.total = total
        if self.center_end is not None and not self.serves:
            self.center_end.open()

    def serve(self, on_turn: Callable[[], None] | None = None) -> None:
        """Serve the workers until all have left; on a center rank only."""
        assert self.center_end is not None
        serve(self.center_end, self._apply, on_turn)

    @property
    def c(self) -> Array:
        """(n,) the center variable, where this rank holds it; else as last pulled."""
        if self.center_end is not None:
            return self.center_end.c
        end: Any = self.workers[0].end
        c: Array = getattr(end, "c", self.workers[0].o)
        return c


def connect(
    comm: MPI.Comm,
    rule: Rule,
    x: Array,
    optimizer: Optimizer | None,
    center_optimizer: Optimizer | None = None,
    *,
    transport: str = "p2p",
    overlap: bool = False,
    slots: int = 4,
    workers: int = 1,
    observe: Observe | None = None,
    record: Record | None = None,
) -> Member:
    """Give this rank its part; collective over `comm`, which must be ours (duplicated).

    `x`: (n,) parameters of this rank, moved in place; rank 0's are the center's. `observe(commit, c)` is called
    after each applied commit where the center is applied (every rank with transport collective), `record(commit,
    reply)` after each message, whatever it asks.
    """
    wire = Direct() if on_host(x) else Staged()
    count = {"p2p": comm.size - 1, "collective": comm.size, "local": workers}[transport]

    def apply(commit: Commit, c: Array) -> Reply:
        reply = center.apply(commit, c)
        if observe is not None and commit.payload is not None:
            observe(commit, c)
        if record is not None:
            record(commit, reply)
        return reply

    def worker(end: WorkerEnd, index: int, x: Array) -> Worker:
        return Worker(x, rule, optimizer, end, index, overlap)

    if transport == "p2p":
        from .transport.p2p import P2PCenter, P2PWorker

        if comm.rank == 0:
            c = full_like(to_host(x), to_host(x))
            center = Center(rule, c, count, center_optimizer)
            end = P2PCenter(comm, c, slots)
            center.between = end.move_on
            return Member(center, end, [], apply, serves=True)
        center = Center(rule, x[:0], count)  # only its counts are of use here
        return Member(center, None, [worker(P2PWorker(comm, wire), comm.rank - 1, x)], apply, serves=False)
    if transport == "collective":
        from .transport.collective import CollectiveEnd

        buffer = wire.incoming(x)
        if comm.rank == 0:
            buffer[...] = wire.outgoing(x)
        comm.Bcast(buffer, 0)
        wire.arrived(x)
        c = full_like(x, x)
        center = Center(rule, c, count, center_optimizer)
        replica = CollectiveEnd(comm, c, apply, wire)
        return Member(center, None, [worker(replica, comm.rank, x)], apply, serves=False)
    c = x.copy()
    center = Center(rule, c, count, center_optimizer)
    local = LocalCenter(c, count, apply)
    members = [worker(local.worker_end(i), i, x if i == 0 else x.copy()) for i in range(count)]
    return Member(center, local, members, apply, serves=False)


def drive(loops: list[Iterator[int]]) -> None:
    """Run the loops of several workers in one thread, a step of each in turn."""
    while loops:
        loops = [loop for loop in loops if next(loop, None) is not None]


def say_and_abort(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error with this rank's name in one piece, and end the whole job; code 1, or that of a sys.exit."""
    text = "".join(traceback.format_exception(error))
    place_name = f"rank {comm.rank} on {MPI.Get_processor_name()}"
    sys.stdout.flush()
    sys.stderr.write(f"agnmpi: {place_name} failed, ending the job:\n{text}")
    sys.stderr.flush()
    code = error.code if isinstance(error, SystemExit) else 1
    abort(comm, code if isinstance(code, int) and code else 1)


def abort(comm: MPI.Comm, code: int) -> None:
    """End the whole job, after a moment for what has been printed."""
    time.sleep(0.5)  # MPICH 5.0.2's hydra may drop what a rank wrote just before MPI_Abort
    comm.Abort(code)


class AbortOnException:
    """While installed, an uncaught exception on this rank ends the job instead of leaving the others waiting."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self._previous = comm, sys.excepthook
        self._installed = comm.size > 1
        if self._installed:
            sys.excepthook = self._hook

    def _hook(self, kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        if self._installed:
            say_and_abort(self._comm, error)
        else:  # removed, while a later hook that stands before it goes on
            self._previous(kind, error, tb)

    def remove(self) -> None:
        """Restore the hook that was there before."""
        if self._installed and sys.excepthook == self._hook:
            sys.excepthook = self._previous
        self._installed = False
