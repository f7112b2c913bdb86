"""Where the ranks run, on which cores; and that they train the same model."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, cast

from mpi4py import MPI

from ..core.params import Layout
from ..transport.agreement import ConfigError, allgather, require_equal
from ..version import __version__, mpi_library
from .machine import started

_connected = False  # with ranks of another job, now or at some time


class Place(NamedTuple):
    """A rank's place among the ranks of its node."""

    host: str
    local_size: int
    worker_index: int  # among the workers of this node
    threads: int  # of BLAS and of the host kernels, so that the ranks of the node share the cores


def place(comm: MPI.Comm, trains: bool, spare: bool = False) -> Place:
    """Find this rank's place; collective.

    Ranks that train on the same cores share them; a center has the cores on which none trains, at least one thread.
    OMP_NUM_THREADS overrides that.

    Args:
        comm: all ranks.
        trains: whether this rank computes (a center hardly does).
        spare: whether it does only when another is lost, whose share it then has.
    """
    node = same_host(comm)
    try:
        cores = sorted(os.sched_getaffinity(0))
        ranks = [json.loads(text) for text in allgather(node, json.dumps([trains, spare, cores]))]
        busy = [trained for trained, *_ in ranks]
        training = [other_cores for trained, waits, other_cores in ranks if trained and not waits]
        groups, group = cast(tuple[int, int], comm.Get_attr(_division()) or (1, 0))
        threads = len(cores) // max(training.count(cores), 1) if trains else len(set(cores).difference(*training))
        threads //= groups
        if (wanted := os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]).isdigit():
            threads = int(wanted)
        index = group * sum(busy) + sum(busy[: node.rank])
        return Place(MPI.Get_processor_name(), node.size, index, max(1, threads))
    finally:
        node.Free()


@cache
def _division() -> int:
    """The attribute of a communicator that trains beside others: the groups on its cores, and its number on its host.

    Its duplicates have it, too.
    """
    return MPI.Comm.Create_keyval(copy_fn=lambda _comm, _keyval, value: value)


def divide_hosts(comm: MPI.Comm, group: MPI.Comm, number: int) -> None:
    """Let `group`, which is number `number` of `comm`, share hosts with the other groups; collective over `comm`."""
    cores = os.sched_getaffinity(0)
    mine = MPI.Get_processor_name(), number, sorted(cores)
    ranks = [json.loads(text) for text in allgather(comm, json.dumps(mine))]
    here = [(other, theirs) for host, other, theirs in ranks if host == mine[0]]
    sharing = {other for other, theirs in here if cores.intersection(theirs)}
    group.Set_attr(_division(), (len(sharing), sorted({other for other, _ in here}).index(number)))


def hosts(comm: MPI.Comm) -> list[str]:
    """The host of each rank, by its name; collective.

    Not by Split_type: for MPICH 5.0 each rank is alone where its hosts are listed in turn (h0,h1,h0,h1).
    """
    return allgather(comm, MPI.Get_processor_name())


def same_host(comm: MPI.Comm) -> MPI.Comm:
    """A communicator of the ranks on this host; collective."""
    names = hosts(comm)
    return comm.Split(names.index(names[comm.rank]), comm.rank)


def one_center_per_host(hosts: Sequence[object]) -> list[int]:
    """The ranks that serve so that a center is on each host, beside its workers; in order, rank 0 always first.

    A host's center is its lowest rank. A host of one rank has none, unless that is rank 0: it would have no worker.

    Args:
        hosts: of each rank, any names.

    >>> one_center_per_host(["a", "a", "b", "b", "c"]), one_center_per_host(["a", "b", "c", "a", "b", "c"])
    ([0, 2], [0, 1, 2])
    """
    lowest, counts = dict[object, int](), Counter(hosts)
    for rank, host in enumerate(hosts):
        lowest.setdefault(host, rank)
    return [rank for host, rank in lowest.items() if rank == 0 or counts[host] > 1]


def node_centers(hosts: Sequence[object]) -> list[tuple[int, ...]]:
    """The ranks of each host that has a node center: first the node center, the lowest, then its workers.

    A host of two ranks or one has none: it would have no commits to sum. On that of rank 0 the workers have a center
    already.

    Args:
        hosts: of each rank, any names.

    >>> node_centers(["a", "a", "b", "b", "b", "c", "c"])
    [(2, 3, 4)]
    """
    ranks = dict[object, list[int]]()
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return [tuple(group) for host, group in ranks.items() if host != hosts[0] and len(group) > 2]


def check_world(comm: MPI.Comm, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what is no intracommunicator, and a world of one rank where the launcher started several."""
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an mpi4py intracommunicator, not {type(comm).__name__}")
    if MPI.COMM_WORLD.size > 1 or comm.size > 1:
        return
    # Under mpiexec the tasks of the step are its daemons, one on each node.
    by_mpiexec = "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in environment else "1"
    if tasks not in ("", "1") and not by_mpiexec:
        pmi = "pmix" if mpi_library().startswith("Open MPI") else "pmi2"
        raise ConfigError(
            f"srun started {tasks} tasks, but each is a world of its own: {mpi_library()} "
            f"does not speak what srun offered; pass srun --mpi={pmi}, or use mpiexec of the same environment "
            "in the batch file"
        )
    if ranks := started(environment):
        raise ConfigError(
            f"the launcher started {ranks} ranks, but each is a world of its own: mpiexec is of another MPI than "
            f"mpi4py's ({mpi_library()}); use the mpiexec of the same environment"
        )


def fault_tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's `mpiexec --with-ft ulfm`, or AGNMPI_FT=1 for others."""
    return "1" in (environment.get("OMPI_MCA_mpi_ft_enable"), environment.get("AGNMPI_FT"))


def leave_without_finalize() -> None:
    """MPI_Finalize would wait for all that this rank was ever connected with, also for the dead: leave without it."""
    global _connected
    _connected = True


def may_finalize(ranks: int) -> bool:
    """Whether MPI_Finalize returns in a world of so many: not in Open MPI 5.0 with ULFM, if a rank has died."""
    return not (_connected or (ranks > 1 and fault_tolerant()))


def require_equal_model(comm: MPI.Comm, layout: Layout, facts: Mapping[str, str]) -> None:
    """Refuse, on all ranks, parameters or `facts` that differ between them."""
    shapes = {f"parameter {name!r}": f"shape {shape}" for name, shape in zip(layout.names, layout.shapes)}
    require_equal(comm, {"agnmpi version": __version__, **facts, "dtype": layout.dtype, **shapes})
    require_equal(comm, {"order of parameters": ", ".join(layout.names), "numbers in buffers": str(layout.buffers)})
