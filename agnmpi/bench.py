"""Exchanges against bare mpi4py calls, and optimizers against memcpy: side by side in one run.

The two sides take turns in short rounds, so that the noise of the machine falls on both; medians are compared.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from . import agree, rules
from .backend import Array, empty_like, full_like
from .bench_optimizers import optimizer_bandwidth
from .center import Center, serve
from .job import library
from .transport.base import Commit, finish
from .transport.p2p import P2PCenter, P2PWorker
from .version import __version__

_BLOCKS = 20  # turns of each side


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _zeros(n: int) -> Array:
    return full_like(np.empty(n, np.float32), 0)


def _meet(comm: MPI.Comm) -> None:
    finish(comm.Ibarrier().Test)


def _p2p(comm: MPI.Comm, x: Array, center: Center | None, end: Any, count: int, state: list[int]) -> list[float]:
    """Seconds of each of `count` exchanges of every worker, through agnmpi."""
    if center is not None:
        serve(end, center.apply)
        return []
    out, times = empty_like(x), []
    for _ in range(count):
        state[0] += 1
        commit = Commit(comm.rank - 1, state[0], steps=1, payload=x)
        times.append(_timed(end.exchange(commit, out).wait))
    end.leave(None, out).wait()
    return times


def _floor(comm: MPI.Comm, x: Array, count: int) -> list[float]:
    """The same bytes by Recv, add, Send."""
    if comm.rank == 0:
        c, status = _zeros(x.size), MPI.Status()
        for _ in range(count * (comm.size - 1)):
            comm.Recv(x, MPI.ANY_SOURCE, 1, status)
            np.add(c, x, out=c)
            comm.Send(c, status.source, 2)
        return []
    out = empty_like(x)

    def exchange() -> None:
        comm.Send(x, 0, 1)
        comm.Recv(out, 0, 2)

    return [_timed(exchange) for _ in range(count)]


def exchanges(comm: MPI.Comm, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time exchanges of float32 vectors of each size; collective, the rows are the same on every rank."""
    rows = []
    for n in sizes:
        x = _zeros(n)
        center = Center(rules.agn(), x, comm.size - 1) if comm.rank == 0 else None
        end: Any = P2PCenter(comm, _zeros(n)) if comm.rank == 0 else P2PWorker(comm)
        if center is not None:
            center.between = end.move_on
        sides: dict[str, list[float]] = {"p2p": [], "floor": []}
        state = [0]
        count = max(1, rounds // _BLOCKS)
        for block in range(_BLOCKS + 1):
            _meet(comm)
            ours = _p2p(comm, x, center, end, count, state)
            _meet(comm)
            bare = _floor(comm, x, count)
            if block:  # the first only warms up
                sides["p2p"] += ours
                sides["floor"] += bare
        everyone = [json.loads(text) for text in agree.allgather(comm, json.dumps(sides))]
        times = {side: [t for theirs in everyone for t in theirs[side]] for side in sides}
        rows += [_row(side, n, comm.size - 1, times) for side in sides]
    return rows


def _row(side: str, n: int, workers: int, times: dict[str, list[float]]) -> dict[str, Any]:
    median = statistics.median(times[side])
    low, _, high = statistics.quantiles(times[side], n=4)
    return {
        "side": side,
        "n": n,
        "workers": workers,
        "exchanges": len(times[side]),
        "seconds": median,
        "spread": [low, high],
        "exchanges_per_second": workers / median,
        "bytes_per_second": workers * 8 * n / median,
        "ratio": median / statistics.median(times["floor"]),
    }


def quiet(comm: MPI.Comm, rounds: int, pause: float = 0.2, n: int = 1000) -> dict[str, float]:
    """What waiting costs: parts of a core while nothing happens, and the exchange after a pause of the workers.

    `center_cpu`, `worker_cpu`: CPU time over wall time of a waiting center and of a waiting worker.
    """
    x = np.zeros(n, np.float32)
    end: Any = P2PCenter(comm, x.copy()) if comm.rank == 0 else P2PWorker(comm)
    facts: dict[str, list[float]] = {"cpu": [], "busy": [], "quiet": []}
    for _ in range(rounds):
        _meet(comm)
        # The workers pause: the center waits.
        start, cpu = time.perf_counter(), time.process_time()
        if comm.rank == 0:
            serve(end, Center(rules.agn(), x, comm.size - 1).apply)
            facts["cpu"].append((time.process_time() - cpu) / (time.perf_counter() - start))
        else:
            out = np.empty_like(x)
            for sequence, kind in enumerate(("busy", "busy", "quiet"), 1):
                if kind == "quiet":
                    time.sleep(pause)
                commit = Commit(comm.rank - 1, sequence, steps=1, payload=x)
                seconds = _timed(end.exchange(commit, out).wait)
                if sequence > 1:
                    facts[kind].append(seconds)
            end.leave(None, out).wait()
        # The center pauses before it applies: the workers wait.
        _meet(comm)
        if comm.rank == 0:
            center = Center(rules.agn(), x, comm.size - 1)

            def late(commit: Commit, c: Array, center: Center = center) -> Any:
                if commit.payload is not None and not center.clock:
                    time.sleep(pause)
                return center.apply(commit, c)

            serve(end, late)
        else:
            start, cpu = time.perf_counter(), time.process_time()
            end.exchange(Commit(comm.rank - 1, 1, steps=1, payload=x), out).wait()
            facts["cpu"].append((time.process_time() - cpu) / (time.perf_counter() - start))
            end.leave(None, out).wait()
    everyone = [json.loads(text) for text in agree.allgather(comm, json.dumps(facts))]

    def median(key: str) -> float:
        return float(statistics.median(value for theirs in everyone[1:] for value in theirs[key]))

    return {
        "center_cpu": statistics.median(everyone[0]["cpu"]),
        "worker_cpu": median("cpu"),
        "busy_seconds": median("busy"),
        "quiet_seconds": median("quiet"),
    }


def main(
    comm: MPI.Comm, sizes: list[int], rounds: int, quiet_rounds: int, optimizer_size: int, path: str | None
) -> int:
    """Measure, print tables on rank 0, and write JSON to `path`."""
    if min(sizes) < 1 or rounds < 1 or quiet_rounds < 0 or optimizer_size < 0:
        raise agree.ConfigError("sizes and rounds must be at least 1, quiet and optimizer-size at least 0")
    comm = comm.Dup()
    report: dict[str, Any] = {"agnmpi": __version__, "mpi": library(), "world": comm.size}
    report["exchanges"] = exchanges(comm, sizes, rounds) if comm.size > 1 else []
    report["quiet"] = quiet(comm, quiet_rounds) if comm.size > 1 and quiet_rounds else {}
    report["optimizers"] = optimizer_bandwidth(optimizer_size) if comm.rank == 0 and optimizer_size else []
    _meet(comm)
    if comm.rank == 0:
        _show(report)
        if path:
            Path(path).write_text(json.dumps(report, indent=2) + "\n")
    comm.Free()
    return 0


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from .monitor import console as make_console

    console = make_console()
    console.print(f"agnmpi {report['agnmpi']}, {report['mpi']}, {report['world']} ranks")
    if report["exchanges"]:
        table = Table(title="exchanges (floor: Recv, add, Send by bare mpi4py)", box=None, pad_edge=False)
        for column in ("side", "n", "workers", "median", "25-75 %", "exchanges/s", "GB/s", "x floor"):
            table.add_column(column, justify="left" if column == "side" else "right")
        for row in report["exchanges"]:
            low, high = (f"{1e6 * seconds:,.0f}" for seconds in row["spread"])
            table.add_row(
                row["side"], f"{row['n']:,}", str(row["workers"]), f"{1e6 * row['seconds']:,.0f} µs",
                f"{low}-{high}", f"{row['exchanges_per_second']:,.0f}",
                f"{row['bytes_per_second'] / 1e9:.3f}", f"{row['ratio']:.2f}",
            )  # fmt: skip
        console.print(table)
    else:
        console.print("one rank: no exchanges; type: mpiexec -n 2 python -m agnmpi bench")
    if report["quiet"]:
        facts = report["quiet"]
        console.print(
            f"waiting: center {100 * facts['center_cpu']:.1f} % of a core, worker {100 * facts['worker_cpu']:.1f} %; "
            f"exchange {1e6 * facts['busy_seconds']:,.0f} µs, "
            f"after 0.2 s of quiet {1e6 * facts['quiet_seconds']:,.0f} µs"
        )
    if report["optimizers"]:
        table = Table(title="host optimizers, float32", box=None, pad_edge=False)
        for column in ("name", "n", "GB/s", "of memcpy"):
            table.add_column(column, justify="left" if column == "name" else "right")
        for row in report["optimizers"]:
            rate = f"{row['bytes_per_second'] / 1e9:.1f}"
            table.add_row(row["name"], f"{row['n']:,}", rate, f"{100 * row['ratio']:.0f} %")
        console.print(table)
