"""What a world must offer: places and cores, agreement on the model, and how a failure of one rank ends all."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from mpi4py import MPI

from .agree import ConfigError, agree, allgather
from .params import Layout
from .rules import Rule, Seen
from .version import __version__, mpi_library


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
    # Under mpiexec the tasks of the step are its daemons, one on each node.
    by_mpiexec = "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in environment else "1"
    if tasks not in ("", "1") and not by_mpiexec:
        speaks = "pmix" if mpi_library().startswith("Open MPI") else "pmi2"
        raise ConfigError(
            f"srun started {tasks} tasks, but each is a world of its own: {mpi_library()} "
            f"does not speak what srun offered; pass srun --mpi={speaks}, or use mpiexec of the same environment "
            "in the batch file"
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if environment.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(
                f"the launcher started {environment[name]} ranks, but each is a world of its own: mpiexec is of "
                f"another MPI than mpi4py's ({mpi_library()}); use the mpiexec of the same environment"
            )


def unused_devices(devices: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Say that SLURM gave this node GPUs of which none can be used; `devices`: how many can.

    >>> unused_devices(4, {"SLURM_GPUS_ON_NODE": "4"}), unused_devices(0, {})
    ([], [])
    """
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    if devices or given in ("", "0"):
        return []
    return [
        f"WARNING: SLURM gave this job {given} GPU(s) on this node, but CuPy finds none: the workers compute on the "
        "CPU; agnmpi doctor says what is missing"
    ]


def agree_on_model(comm: MPI.Comm, layout: Layout, facts: Mapping[str, str]) -> None:
    """Refuse, on all ranks, parameters or `facts` that differ between them."""
    shapes = {f"parameter {name!r}": f"shape {shape}" for name, shape in zip(layout.names, layout.shapes)}
    agree(comm, {"agnmpi version": __version__, **facts, "dtype": layout.dtype, **shapes})
    agree(comm, {"order of parameters": ", ".join(layout.names)})


def advice(rule: Rule, workers: int, period: int) -> list[str]:
    """What n/λ means for this run (arXiv:1710.02368, section 4, and DESIGN's own check); empty for other rules."""
    if rule.name != "agn":
        return []
    ratio = workers / period
    lines = [f"n/λ = {workers}/{period} = {ratio:.3g} (workers / communication period)"]
    if rule.weighs:
        ratio *= rule.weight(Seen(workers - 1, 1, period, workers))
        lines.append(f"effective outer rate {ratio:.3g}: what a round of {workers} ordinary commits counts")
    if ratio > 2:
        lines.append(
            "WARNING: above 2 AGN becomes unstable: expect worse accuracy or divergence; "
            f"use a period of at least {-(-workers // 2)}, fewer workers, or an outer rate of 1"
        )
    elif ratio < 0.8:
        lines.append(
            f"note: each round of commits moves the center by only {ratio:.3g} mean displacements, so progress "
            f"per sample is slow at first; a shorter period (about {max(1, workers)}), or an outer rate of 1, often "
            "learns more per sample"
        )
    return lines


def drive(loops: list[Iterator[int]]) -> None:
    """Run the loops of several workers in one thread, a step of each in turn."""
    while loops:
        loops = [loop for loop in loops if next(loop, None) is not None]


def say(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error with this rank's name in one piece."""
    text = "".join(traceback.format_exception(error))
    place_name = f"rank {comm.rank} on {MPI.Get_processor_name()}"
    sys.stdout.flush()
    sys.stderr.write(f"agnmpi: {place_name} failed, ending the job:\n{text}")
    sys.stderr.flush()


def say_and_abort(comm: MPI.Comm, error: BaseException) -> None:
    """Print the error, and end the whole job; code 1, or that of a sys.exit."""
    say(comm, error)
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
