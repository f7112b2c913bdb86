"""Reports the MPI library, each rank's role and device, what is missing and what to type."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from rich.table import Table

from ..arrays.backend import device_count
from ..arrays.kernels import set_threads
from ..bench import encodings
from ..cluster import probe
from ..cluster.machine import unused_devices
from ..cluster.placement import (
    check_world,
    fault_tolerant,
    hosts,
    one_center_per_host,
    place,
    same_host,
)
from ..cluster.setup import LEVELS
from ..core.backoff import wait_until
from ..core.rules import agn, outer_rate, weighted
from ..reporting.advice import advice
from ..transport.agreement import ConfigError, allgather, format_ranks
from ..transport.windows import Windows
from ..version import __version__, mpi_library


def _wire(comm: MPI.Comm, devices: int, again: bool) -> str:
    """How vectors on a device would travel from this rank, and why; one rank of each host tries it. Collective."""
    node = same_host(comm)
    if devices and node.rank == 0 and (again or probe.recall() is None):
        probe.remember(probe.run())
    wait_until(node.Ibarrier().Test)
    node.Free()
    if not devices:
        return "host memory: sent as it is"
    try:
        answer = probe.resolve("auto")
    except ValueError as error:
        return f"refused: {error}"
    p2p, rma = ("direct" if works else "staged" for works in (answer.messages, answer.windows))
    return f"{p2p} with p2p, {rma} with rma: {answer.why}"


def _windows(comm: MPI.Comm) -> str:
    """How fast windows are here, found out by a trial; collective."""
    if comm.size == 1 or len(set(hosts(comm))) > 1:
        return ""  # across hosts they are as slow as the network
    try:
        windows = Windows(comm, np.zeros(1, np.float32), 0)
    except ConfigError as error:
        return str(error)
    windows.free()
    return windows.caveat or "windows are shared memory: transports rma and accumulate are fast on this host"


def examine(comm: MPI.Comm, period: int, again: bool = False) -> dict[str, Any]:
    """Gather the facts of the whole world; collective, the same on every rank.

    `again`: try device pointers again, even if the answer is cached.
    """
    problems = []
    try:
        check_world(comm)
    except ConfigError as error:
        problems.append(str(error))
    trains = comm.rank > 0 or comm.size == 1
    here = place(comm, trains)
    devices = device_count()
    wire = _wire(comm, devices, again)
    own_facts = {
        "rank": comm.rank,
        "host": here.host,
        "role": ("worker" if comm.rank else "center") if comm.size > 1 else "alone",
        "device": f"gpu {here.worker_index % devices}" if devices and trains else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "blas_threads": here.threads,
        "local_size": here.local_size,
        "wire": wire,
        "library": mpi_library(),
        "agnmpi": __version__,
    }
    ranks = [json.loads(text) for text in allgather(comm, json.dumps(own_facts))]
    for key in ("library", "agnmpi"):
        if len({rank[key] for rank in ranks}) > 1:
            problems.append(f"the ranks run different versions of {key}: use one environment on all hosts")
    hints = _hints(comm, ranks, devices)
    return {
        "agnmpi": __version__,
        "mpi": mpi_library(),
        "mpi_standard": "{}.{}".format(*MPI.Get_version()),
        "mpi4py": importlib.metadata.version("mpi4py"),
        "fault_tolerant": fault_tolerant(),
        "thread_level": LEVELS[MPI.Query_thread()],
        "world": comm.size,
        "ranks": ranks,
        "advice": advice(weighted(agn(), outer_rate(1.0)), comm.size - 1, period) if comm.size > 1 else [],
        "hints": hints,
        "problems": problems,
    }


def _hints(comm: MPI.Comm, ranks: Sequence[Mapping[str, Any]], devices: int) -> list[str]:
    """What may be better, and what to type for it; collective."""
    hints = [windows] if (windows := _windows(comm)) else []
    if comm.size == 1:
        hints.append("one rank: a rule with a center needs two or more; type: mpiexec -n 4 python -m agnmpi doctor")
    bin_dir = str(Path(sys.executable).parent)
    if not shutil.which("mpiexec") and not shutil.which("mpiexec", path=bin_dir):
        hints.append("no mpiexec on PATH; type: pip install mpich, or load your cluster's MPI module")
    if (centers := len(one_center_per_host(hosts(comm)))) > 1:
        hints.append(
            f"{centers} hosts with several ranks: with --centers hosts each holds a part of the center, beside its "
            f"workers, and a link carries 1/{centers} of the bytes; start one rank more on each for it"
        )
    if not devices:
        hints += [*unused_devices(devices), _no_device()]
    crowded = any(rank["local_size"] > rank["cores"] for rank in ranks)
    if crowded and "Open MPI" in mpi_library() and os.environ.get("OMPI_MCA_mpi_yield_when_idle") != "1":  # noqa: SIM112
        hints.append("more ranks than cores under Open MPI: type: . jobs/env-openmpi.sh, so that waiting ranks yield")
    return hints


def _encodings(comm: MPI.Comm, threads: int) -> list[str]:
    """On which link which encoding pays, measured with `threads` at rank 0, and that to another host; collective."""
    link = _gigabits(comm)
    if comm.rank:
        return []
    set_threads(threads)
    costs = encodings.measured_costs()
    if link is None:
        return encodings.advice(costs)
    lines = encodings.advice(costs, [link])
    return [lines[0], f"{lines[1]} (the link between the first two hosts, measured)", *lines[2:]]


def _gigabits(comm: MPI.Comm, nbytes: int = 4 << 20, rounds: int = 5) -> float | None:
    """Gbit/s from rank 0 to the first rank on another host, at rank 0; None if there is none. Collective."""
    names = hosts(comm)
    other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
    if other is None or comm.rank not in (0, other):
        return None
    numbers, answer, taken = np.zeros(nbytes, np.uint8), np.zeros(1, np.uint8), []
    for _ in range(rounds):
        start = time.perf_counter()
        if comm.rank == 0:
            wait_until(comm.Isend(numbers, other).Test)
            wait_until(comm.Irecv(answer, other).Test)
        else:
            wait_until(comm.Irecv(numbers, 0).Test)
            wait_until(comm.Isend(answer, 0).Test)
        taken.append(time.perf_counter() - start)
    return 8e-9 * nbytes / min(taken)


def _no_device() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "CPU only: CuPy is not installed; for NVIDIA GPUs type: pip install cupy-cuda12x (or 13x)"
    return "CPU only: CuPy is installed but finds no CUDA device or driver here (nvidia-smi tells)"


def main(comm: MPI.Comm, period: int, again: bool, as_json: bool, with_encodings: bool = False) -> int:
    """Print the report on rank 0; returns 1 if something is wrong, else 0."""
    if period < 1:
        raise ConfigError(f"period must be at least 1, not {period}")
    report = examine(comm, period, again)
    if with_encodings:
        report["advice"] += _encodings(comm, report["ranks"][0]["blas_threads"])
    if comm.rank == 0:
        print(json.dumps(report, indent=2)) if as_json else _show(report)
    return 1 if report["problems"] else 0


def _show(report: dict[str, Any]) -> None:
    from ..reporting.terminal import console as make_console

    console = make_console()
    console.print(
        f"agnmpi {report['agnmpi']}, {report['mpi']} (MPI {report['mpi_standard']}), mpi4py {report['mpi4py']}, "
        f"thread level {report['thread_level']}, world of {report['world']}"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("rank", "host", "role", "device", "cores", "BLAS threads"):
        table.add_column(title, justify="right" if title in ("rank", "cores", "BLAS threads") else "left")
    for rank in report["ranks"]:
        table.add_row(*(str(rank[key]) for key in ("rank", "host", "role", "device", "cores", "blas_threads")))
    console.print(table)
    wires: dict[str, list[int]] = {}
    for rank in report["ranks"]:
        wires.setdefault(rank["wire"], []).append(rank["rank"])
    for wire, ranks in wires.items():
        console.print(f"wire of {format_ranks(ranks)}: {wire}", markup=False, soft_wrap=True)
    if report["fault_tolerant"]:
        console.print(
            "fault tolerant (ULFM): train goes on without ranks that die, the center too (transport p2p, one center)"
        )
    for line in report["advice"] + report["hints"]:
        console.print(line, markup=False, soft_wrap=True)
    for line in report["problems"]:
        console.print(f"PROBLEM: {line}", style="bold red", markup=False, soft_wrap=True)
