"""`agnmpi bench`: measures exchanges, waiting, the cost of an exchange beside the wire, and optimizers."""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, choose, full_like, namespace, synchronize
from ..arrays.kernels import set_threads
from ..cluster.placement import place
from ..cluster.probe import choose_wire
from ..core import rules
from ..core.worker import Worker
from ..transport.agreement import ConfigError, allgather, raise_on_all
from ..transport.registry import resolve
from ..version import __version__, mpi_library
from .exchanges import barrier, exchanges, timed, zeros
from .optimizers import device_bandwidth, optimizer_bandwidth
from .periods import NoWire
from .tables import print_table
from .waiting import waiting_cost
from .written import json_file


def pack_only(sizes: Sequence[int], repeats: int, xp: ModuleType = np) -> list[dict[str, Any]]:
    """Time a worker's part of an exchange besides the wire, against memcpy of the vector."""
    rows = []
    for n in sizes:
        x = zeros(n, xp)
        y = full_like(x, 0)
        worker = Worker(x, rules.agn(), None, NoWire(), 0)
        worker.begin()
        times: dict[str, list[float]] = {"pack": [], "memcpy": []}

        def pack(worker: Worker = worker, x: Array = x) -> None:
            worker.step(None)
            synchronize(x)

        def copy(x: Array = x, y: Array = y) -> None:
            y[...] = x
            synchronize(y)

        for _ in range(repeats + 1):
            times["pack"].append(timed(pack))
            times["memcpy"].append(timed(copy))
        medians = {side: statistics.median(seconds[1:]) for side, seconds in times.items()}
        device = "cpu" if namespace(x) is np else "gpu"
        rows.append({"n": n, "device": device, **medians, "ratio": medians["pack"] / medians["memcpy"]})
    return rows


class Options(NamedTuple):
    """What to measure; see `agnmpi bench --help`."""

    sizes: Sequence[int]
    transports: Sequence[str]
    workers: Sequence[int]
    rounds: int
    quiet: int
    optimizer_size: int
    pack_only: bool
    device: str
    json: str | None


def _wires(comm: MPI.Intracomm, x: Array, transport: str) -> list[str]:
    return ["staged"] + ["direct"] * (choose_wire(comm, x, resolve(transport)) == "direct")


def main(comm: MPI.Intracomm, options: Options) -> int:
    """Measure, print tables on rank 0, and write JSON."""
    if min(options.sizes) < 1 or options.rounds < 1 or options.quiet < 0 or options.optimizer_size < 0:
        raise ConfigError("sizes and rounds must be at least 1, quiet and optimizer-size at least 0")
    if comm.size == 1 and options.workers:
        raise ConfigError("one rank, and so no workers; type: mpiexec -n 2 python -m agnmpi bench")
    counts = list(options.workers) or [comm.size - 1]
    if comm.size > 1 and not 0 < min(counts) <= max(counts) < comm.size:
        raise ConfigError(f"workers must be 1 to {comm.size - 1} in a world of {comm.size}, not {counts}")
    write = json_file(comm, options.json)
    comm = comm.Dup()
    here = place(comm, comm.rank > 0)
    set_threads(here.threads)  # as a session does
    xp = raise_on_all(comm, lambda: choose(options.device, here.worker_index))
    devices = any(allgather(comm, "" if xp is np else "device"))
    wires = {name: _wires(comm, zeros(1, xp), name) if devices else ["direct"] for name in options.transports}
    report: dict[str, Any] = {"agnmpi": __version__, "mpi": mpi_library(), "world": comm.size}
    several = comm.size > 1 and not options.pack_only
    report["exchanges"] = exchanges(comm, wires, options.sizes, counts, options.rounds, xp) if several else []
    report["quiet"] = waiting_cost(comm, options.quiet) if several and options.quiet else {}
    alone = comm.rank == min(1, comm.size - 1)  # a worker
    packed = pack_only(options.sizes, options.rounds, xp) if alone else []
    barrier(comm)
    report["pack"] = json.loads(allgather(comm, json.dumps(packed))[min(1, comm.size - 1)])
    measured = []
    if alone and (n := options.optimizer_size):
        counts = sorted({1, here.threads})
        measured = [row for t in counts for row in optimizer_bandwidth(n, t)] if xp is np else device_bandwidth(n)
    report["optimizers"] = json.loads(allgather(comm, json.dumps(measured))[min(1, comm.size - 1)])
    barrier(comm)
    if comm.rank == 0:
        _show(report)
        write(json.dumps(report, indent=2) + "\n")
    comm.Free()
    return 0


def _show(report: dict[str, Any]) -> None:
    from ..reporting.terminal import console as make_console

    console = make_console()
    console.print(f"agnmpi {report['agnmpi']}, {report['mpi']}, {report['world']} ranks")

    table = partial(print_table, console, left=("transport", "wire", "side", "name"))
    if report["exchanges"]:
        lines = []
        for row in report["exchanges"]:
            low, high = (f"{1e6 * seconds:,.0f}" for seconds in row["spread"])
            first = row["side"] == "agnmpi"
            lines.append([
                row["transport"] if first else "", row["wire"] if first else "", f"{row['n']:,}" if first else "",
                str(row["workers"]) if first else "", row["side"], f"{1e6 * row['seconds']:,.0f} µs", f"{low}-{high}",
                f"{row['exchanges_per_second']:,.0f}", f"{row['bytes_per_second'] / 1e9:.3f}", f"{row['ratio']:.2f}",
            ])  # fmt: skip
        columns = ("transport", "wire", "n", "workers", "side", "median", "25-75 %", "per second", "GB/s", "x floor")
        table("exchanges (floor: the same bytes by bare mpi4py calls)", columns, lines)
        for caveat in sorted({row["caveat"] for row in report["exchanges"]} - {""}):
            console.print(f"WARNING: {caveat}")
    elif report["world"] == 1:
        console.print("one rank: no exchanges; type: mpiexec -n 2 python -m agnmpi bench")
    if report["quiet"]:
        facts = report["quiet"]
        console.print(
            f"waiting: center {100 * facts['center_cpu']:.1f} % of a core, worker {100 * facts['worker_cpu']:.1f} %; "
            f"exchange {1e6 * facts['busy_seconds']:,.0f} µs, "
            f"after 0.2 s of quiet {1e6 * facts['quiet_seconds']:,.0f} µs"
        )
    lines = [
        [f"{row['n']:,}", f"{1e6 * row['pack']:,.0f} µs", f"{1e6 * row['memcpy']:,.0f} µs", f"{row['ratio']:.1f}"]
        for row in report["pack"]
    ]
    table("without the wire: delta and adopt", ("n", "median", "memcpy", "x memcpy"), lines)
    if report["optimizers"]:
        lines = [
            [
                row["name"], f"{row['n']:,}", str(row.get("threads", "")), f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{100 * row['ratio']:.0f} %", f"{row['times_torch']:.2f}" if "times_torch" in row else "",
            ]
            for row in report["optimizers"]
        ]  # fmt: skip
        library = report["optimizers"][0].get("library", "one launch each")
        title = f"optimizers, float32 (kernels: {library}; x PyTorch: time over its fused optimizer's)"
        table(title, ("name", "n", "threads", "GB/s", "of a copy", "x PyTorch"), lines)
