"""`agnmpi bench utilisation`: how much of their time workers compute, by transport, encoding and overlap.

A step sleeps, as a host does while its GPU computes, and then moves the parameters. The sides alternate in rounds:
periods without exchanges, and those of each case.
"""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, choose, full_like, on_host
from ..arrays.encodings import get
from ..cluster.placement import place
from ..cluster.probe import choose_wire
from ..cluster.setup import Setup
from ..core import rules
from ..core.optimizers import sgd
from ..transport.agreement import ConfigError, raise_on_all
from ..transport.registry import Transport, resolve
from ..version import __version__, mpi_library
from .exchanges import zeros
from .periods import Work, about_unrest, alone, by_worker, exchanging, hidden, unrest, utilisations
from .tables import milliseconds, percent, print_table, size
from .written import json_file


class Options(NamedTuple):
    """What to measure; see `agnmpi bench utilisation --help`."""

    step: float
    slowest: float
    parameters: int
    period: int
    transports: Sequence[str]
    encodings: Sequence[str]
    periods: int
    rounds: int
    no_wait: bool
    device: str
    json: str | None


class Case(NamedTuple):
    """One row: how workers and center exchange.

    A further axis is a field here, a factor in `cases` and a column in `_show`.
    """

    transport: str
    overlap: bool
    encoding: str = "float32"  # of commits and pulls
    wait: bool = True

    def setup(self, wire: str) -> Setup:
        """The setup that it stands for."""
        return Setup(replace(self.entry, wire=wire), self.overlap, caller_uses_mpi=False, wait=self.wait)

    @property
    def entry(self) -> Transport:
        """Its transport."""
        return resolve(self.transport, encoding=self.encoding, pull_encoding=self.encoding)

    def without_overlap(self) -> "Case":
        """The case to compare with."""
        return self._replace(overlap=False, wait=True)

    def exchange_bytes(self, x: Array) -> int:
        """Bytes of the vectors that a worker sends and receives in an exchange of parameters `x` (n,)."""
        return 2 * min(get(self.encoding).nbytes(x.size, x.dtype), x.nbytes)


def cases(transports: Iterable[str], encodings: Iterable[str] = ("float32",), no_wait: bool = False) -> list[Case]:
    """All rows, each after the one that it is compared with; a transport that cannot encode has those of float32.

    `no_wait`: also with workers that do not wait, where there can be such.
    """
    ways = [(False, True), (True, True), *([(True, False)] if no_wait else [])]  # overlap, wait
    return [
        Case(transport, overlap, encoding, wait)
        for transport, encoding, (overlap, wait) in product(transports, encodings, ways)
        if get(encoding).exact or resolve(transport).capabilities.encodings
        if wait or not resolve(transport).capabilities.together
    ]


def row(
    case: Case, compute: Sequence[float], periods: Sequence[float], plain: Sequence[float], noise: float = 0.0
) -> dict[str, Any]:  # fmt: skip
    """What is reported of a case.

    Args:
        case: the case.
        compute: seconds of a period without exchanges, by worker.
        periods: seconds of its periods, by worker.
        plain: the same without overlap.
        noise: how much a period without exchanges differs between rounds: what overlap hides of less is not known.
    """
    shares = utilisations(compute, periods)
    busy, wall = statistics.fmean(compute), statistics.fmean(periods)
    return {
        **case._asdict(),
        "workers": len(periods),
        "period_seconds": wall,
        "compute_seconds": busy,
        "exchange_seconds": wall - busy,
        "utilisation": statistics.fmean(shares),
        "lowest_utilisation": min(shares),
        "hidden": hidden(busy, statistics.fmean(plain), wall, noise) if case.overlap else None,
    }


def main(comm: MPI.Intracomm, options: Options) -> int:
    """Measure, print a table on rank 0, and write JSON."""
    _check(comm, options)
    write = json_file(comm, options.json)
    comm = comm.Dup()
    here = place(comm, comm.rank > 0)
    xp = raise_on_all(comm, lambda: choose(options.device, here.worker_index))
    x = zeros(options.parameters, xp)
    wires = {name: choose_wire(comm, x, resolve(name)) for name in options.transports}
    g = full_like(x, 1e-6)
    seconds_of_step = options.step * (options.slowest if comm.rank == comm.size - 1 else 1)

    def gradient(_step: int) -> tuple[float, Array]:
        time.sleep(seconds_of_step)
        return 0.0, g

    chosen = cases(options.transports, options.encodings, options.no_wait)
    times: dict[Any, list[list[float]]] = {}
    for _ in range(options.rounds):
        for serving in sorted({case.entry.serving_ranks for case in chosen}):
            work = Work(x, gradient, rules.agn(), sgd(1e-3))
            seconds = alone(comm, work, comm.rank >= serving, options.period, options.periods)
            times.setdefault(serving, []).append(seconds)
        for case in chosen:
            rule = rules.synchronous() if case.entry.capabilities.together else rules.agn()
            work = Work(x, gradient, rule, sgd(1e-3))
            seconds = exchanging(comm, case.setup(wires[case.transport]), work, options.period, options.periods)
            times.setdefault(case, []).append(seconds)
    medians = {key: by_worker(comm, rounds) for key, rounds in times.items()}
    noise = {serving: unrest(comm, times[serving]) for serving in sorted({c.entry.serving_ranks for c in chosen})}
    rows = []
    for case in chosen:
        serving = case.entry.serving_ranks
        sides = medians[serving], medians[case], medians[case.without_overlap()]
        rows.append(row(case, *sides, noise[serving]) | {"bytes": case.exchange_bytes(x)})
    if comm.rank == 0:
        given = {name: value for name, value in options._asdict().items() if name != "json"}
        report = {"agnmpi": __version__, "mpi": mpi_library(), "world": comm.size, **given}
        report |= {"unrest": max(noise.values()), "rows": rows}
        _show(report, "cpu" if on_host(x) else "gpu: " + ", ".join(f"{name} {wire}" for name, wire in wires.items()))
        write(json.dumps(report, indent=2) + "\n")
    comm.Free()
    return 0


def _check(comm: MPI.Comm, options: Options) -> None:
    if comm.size == 1:
        raise ConfigError("one rank has nobody to exchange with; type: mpiexec -n 3 python -m agnmpi bench utilisation")
    for name, what in (("step", "of seconds"), ("slowest", "of times")):
        if not (getattr(options, name) >= 0 and np.isfinite(getattr(options, name))):
            raise ConfigError(f"--{name} must be a number {what}, 0 or more, not {getattr(options, name)}")
    for name in ("parameters", "period", "periods", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(options, name)}")


def _show(report: dict[str, Any], where: str) -> None:
    from ..reporting.terminal import console as make_console

    console = make_console()
    console.print(f"agnmpi {report['agnmpi']}, {report['mpi']}, {report['world']} ranks", markup=False)
    lines = [
        [
            row["transport"] if get(row["encoding"]).exact else f"{row['transport']} {row['encoding']}",
            ("yes" if row["wait"] else "no wait") if row["overlap"] else "no", str(row["workers"]),
            milliseconds(row["period_seconds"]), milliseconds(row["compute_seconds"]),
            milliseconds(row["exchange_seconds"]), percent(row["utilisation"]), percent(row["lowest_utilisation"]),
            percent(row["hidden"]), size(row["bytes"]),
        ]
        for row in report["rows"]
    ]  # fmt: skip
    columns = "transport", "overlap", "n", "period", "compute", "exchange", "utilised", "lowest", "hidden", "bytes"
    title = (
        f"λ = {report['period']}, steps of {milliseconds(report['step'])}, {report['parameters']:,} float32 "
        f"({where}); n: workers"
    )
    print_table(console, title, columns, lines, left=("transport", "overlap"))
    for line in about_unrest(report["unrest"]):
        console.print(line, markup=False)
