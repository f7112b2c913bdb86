"""Exchanges against bare mpi4py calls and memcpy, and optimizers against memcpy: side by side in one run.

The two sides take turns in short rounds, so that the noise of the machine falls on both; medians are compared.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from . import agree, rules
from .backend import Array, choose, full_like, namespace, synchronize
from .bench_optimizers import device_bandwidth, optimizer_bandwidth
from .center import Center, serve
from .data import Lease, rounds
from .floors import FLOORS
from .launch import place
from .member import Member
from .probe import choose_wire
from .transport.base import WORK, Commit, Done, Handle, Reply
from .transport.p2p import P2PCenter, P2PWorker
from .version import __version__, mpi_library
from .waiting import finish
from .wiring import Setup, connect
from .worker import Worker

_BLOCKS = 20  # turns of each side
SETUPS = {
    "p2p": Setup("p2p"),
    "rma": Setup("rma"),
    "serverless": Setup("rma", use_locking=False),
    "collective": Setup("collective"),
}


def timed(call: Callable[[], Any]) -> float:
    """Seconds that `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def meet(comm: MPI.Comm) -> None:
    """Wait for the others without stealing their cores."""
    finish(comm.Ibarrier().Test)


def zeros(n: int, xp: ModuleType = np) -> Array:
    """A float32 vector (n,), where a run would have it."""
    return full_like(xp.empty(n, np.float32), 0)


class _Ours:
    """Exchanges through agnmpi, as a run makes them, without the optimizer."""

    def __init__(self, comm: MPI.Comm, setup: Setup, x: Array) -> None:
        rule = rules.synchronous() if setup.transport == "collective" else rules.agn()
        self.member: Member = connect(comm, rule, x, None, setup=setup)
        self._comm, self._setup, self._x, self._out = comm, setup, x, full_like(x, 0)
        self._sequence = 0

    def exchanges(self, count: int) -> list[float]:
        """Seconds of each of `count` exchanges of this worker; a center rank serves meanwhile."""
        if self._setup.transport == "collective":
            end: Any = self.member.workers[0].end
            end.begin(None, rounds(None, 1, self._comm.rank, self._comm.size))
            end.exchange(Commit(self._comm.rank, wants=WORK), None)
        elif not self._setup.use_locking:
            self.member.begin(None, 1)
        if self.member.serves:
            self.member.serve()
            return []
        worker = self.member.workers[0]
        times = []
        for _ in range(count):
            self._sequence += 1
            commit = Commit(worker.index, self._sequence, steps=1, wants=WORK, payload=self._x)
            start = time.perf_counter()
            worker.end.exchange(commit, self._out).wait()
            times.append(time.perf_counter() - start)
        worker.end.leave(None, self._out).wait()
        return times


class Case(NamedTuple):
    """What is measured: a transport, a wire, a size, a number of workers."""

    transport: str
    wire: str
    n: int
    workers: int


def exchanges(
    comm: MPI.Comm, transports: Sequence[str], wires: Sequence[str], sizes: Sequence[int], counts: Sequence[int],
    turns: int, xp: ModuleType = np,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time exchanges of float32 vectors; collective over `comm`, the rows are the same on every rank.

    `counts`: numbers of workers beside the center, on the first ranks of `comm`; `turns`: exchanges of each worker and
    side; `xp`: where the workers' vectors lie.
    """
    rows = []
    for workers in counts:
        for transport in transports:
            ranks = workers + 1  # a collective rule has no center: one worker more
            part = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank)
            mine: list[dict[str, Any]] = []
            if part != MPI.COMM_NULL:
                train = workers if SETUPS[transport].serves else ranks
                for n in sizes:
                    for wire in wires if transport in ("p2p", "rma") else wires[:1]:  # the others are always staged
                        mine += _compare(part, Case(transport, wire, n, train), turns, xp)
                part.Free()
            meet(comm)
            rows += json.loads(agree.allgather(comm, json.dumps(mine))[0])
    return rows


def _compare(comm: MPI.Comm, case: Case, turns: int, xp: ModuleType) -> list[dict[str, Any]]:
    serves = SETUPS[case.transport].serves and comm.rank == 0
    x = zeros(case.n, np if serves else xp)
    ours = _Ours(comm, SETUPS[case.transport]._replace(wire=case.wire), x)
    there = zeros(case.n)
    with FLOORS[case.transport](comm, zeros(case.n)) as floor:
        times: dict[str, list[float]] = {"agnmpi": [], "floor": [], "memcpy": []}
        count = max(1, turns // _BLOCKS)
        for block in range(_BLOCKS + 1):
            meet(comm)
            sides = {"agnmpi": ours.exchanges(count)}
            meet(comm)
            sides["floor"] = floor.exchanges(count)
            meet(comm)
            # Delta and center: each is read and written once in any case.
            sides["memcpy"] = [2 * timed(lambda: np.copyto(there, floor.x)) for _ in range(count)]
            if block:  # the first only warms up
                for side, seconds in sides.items():
                    times[side] += seconds
    ours.member.close()
    everyone = [json.loads(text) for text in agree.allgather(comm, json.dumps(times))]
    merged = {side: [t for theirs in everyone for t in theirs[side]] for side in times}
    floor_median = statistics.median(merged["floor"])
    return [_row(case, side, seconds, floor_median) for side, seconds in merged.items()]


def _row(case: Case, side: str, seconds: list[float], floor: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return {
        **case._asdict(),
        "side": side,
        "exchanges": len(seconds),
        "seconds": median,
        "spread": [low, high],
        "exchanges_per_second": case.workers / median,
        "bytes_per_second": case.workers * 8 * case.n / median,
        "ratio": median / floor,
    }


class _NoWire:
    """An end that answers at once: what is left of an exchange is forming the delta and adopting the center."""

    capabilities = P2PWorker.capabilities

    def exchange(self, _commit: Commit, _out: Array | None) -> Handle:
        return Done(Reply(0, work=Lease(0, 1)))

    def pull(self, _out: Array) -> Handle:
        return Done(Reply(0))

    def leave(self, _commit: Commit | None, _out: Array) -> Handle:
        return Done(Reply(0))

    def close(self) -> None:
        """Nothing to free."""


def pack_only(sizes: Sequence[int], turns: int, xp: ModuleType = np) -> list[dict[str, Any]]:
    """Time what a worker does for an exchange besides the wire, against memcpy of the vector."""
    rows = []
    for n in sizes:
        x = zeros(n, xp)
        y = full_like(x, 0)
        worker = Worker(x, rules.agn(), None, _NoWire(), 0)
        worker.begin()
        times: dict[str, list[float]] = {"pack": [], "memcpy": []}

        def pack(worker: Worker = worker, x: Array = x) -> None:
            worker.step(None)
            synchronize(x)

        def copy(x: Array = x, y: Array = y) -> None:
            y[...] = x
            synchronize(y)

        for _ in range(turns + 1):
            times["pack"].append(timed(pack))
            times["memcpy"].append(timed(copy))
        medians = {side: statistics.median(seconds[1:]) for side, seconds in times.items()}
        device = "cpu" if namespace(x) is np else "gpu"
        rows.append({"n": n, "device": device, **medians, "ratio": medians["pack"] / medians["memcpy"]})
    return rows


def quiet(comm: MPI.Comm, turns: int, pause: float = 0.2, n: int = 1000) -> dict[str, float]:
    """What waiting costs: parts of a core while nothing happens, and the exchange after a pause of the workers.

    `center_cpu`, `worker_cpu`: CPU time over wall time of a waiting center and of a waiting worker.
    """
    x = np.zeros(n, np.float32)
    end: Any = P2PCenter(comm, x.copy()) if comm.rank == 0 else P2PWorker(comm)
    facts: dict[str, list[float]] = {"cpu": [], "busy": [], "quiet": []}
    for _ in range(turns):
        meet(comm)
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
                start = time.perf_counter()
                end.exchange(Commit(comm.rank - 1, sequence, steps=1, payload=x), out).wait()
                seconds = time.perf_counter() - start
                if sequence > 1:
                    facts[kind].append(seconds)
            end.leave(None, out).wait()
        # The center pauses before it applies: the workers wait.
        meet(comm)
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


def main(comm: MPI.Comm, given: Options) -> int:
    """Measure, print tables on rank 0, and write JSON."""
    if min(given.sizes) < 1 or given.rounds < 1 or given.quiet < 0 or given.optimizer_size < 0:
        raise agree.ConfigError("sizes and rounds must be at least 1, quiet and optimizer-size at least 0")
    if comm.size == 1 and given.workers:
        raise agree.ConfigError("one rank, and so no workers; type: mpiexec -n 2 python -m agnmpi bench")
    counts = list(given.workers) or [comm.size - 1]
    if comm.size > 1 and not 0 < min(counts) <= max(counts) < comm.size:
        raise agree.ConfigError(f"workers must be 1 to {comm.size - 1} in a world of {comm.size}, not {counts}")
    path = Path(given.json) if given.json and comm.rank == 0 else None
    # Refused, if it must be, before anything is measured.
    agree.together(comm, lambda: path.open("a").close() if path else None)
    comm = comm.Dup()
    here = place(comm, comm.rank > 0)
    xp = agree.together(comm, lambda: choose(given.device, here.worker_index))
    wires = ["direct"]
    if any(agree.allgather(comm, "" if xp is np else "device")):
        wires = ["staged"] + ["direct"] * (choose_wire(comm, zeros(1, xp), "auto") == "direct")
    report: dict[str, Any] = {"agnmpi": __version__, "mpi": mpi_library(), "world": comm.size}
    several = comm.size > 1 and not given.pack_only
    report["exchanges"] = (
        exchanges(comm, given.transports, wires, given.sizes, counts, given.rounds, xp) if several else []
    )
    report["quiet"] = quiet(comm, given.quiet) if several and given.quiet else {}
    alone = comm.rank == min(1, comm.size - 1)  # a worker
    packed = pack_only(given.sizes, given.rounds, xp) if alone else []
    meet(comm)
    report["pack"] = json.loads(agree.allgather(comm, json.dumps(packed))[min(1, comm.size - 1)])
    measured = []
    if alone and given.optimizer_size:
        measured = optimizer_bandwidth(given.optimizer_size) if xp is np else device_bandwidth(given.optimizer_size)
    report["optimizers"] = json.loads(agree.allgather(comm, json.dumps(measured))[min(1, comm.size - 1)])
    meet(comm)
    if comm.rank == 0:
        _show(report)
        if path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    comm.Free()
    return 0


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from .monitor import console as make_console

    console = make_console()
    console.print(f"agnmpi {report['agnmpi']}, {report['mpi']}, {report['world']} ranks")

    def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        made = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for column in columns:
            made.add_column(column, justify="left" if column in ("transport", "wire", "side", "name") else "right")
        for row in rows:
            made.add_row(*row)
        console.print(made)

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
            [row["name"], f"{row['n']:,}", f"{row['bytes_per_second'] / 1e9:.1f}", f"{100 * row['ratio']:.0f} %"]
            for row in report["optimizers"]
        ]
        table("optimizers, float32", ("name", "n", "GB/s", "of memcpy"), lines)
