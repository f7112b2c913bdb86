"""Exchanges of agnmpi against the same bytes by bare mpi4py calls, and against memcpy: side by side in one run.

The sides alternate in short rounds, so that noise of the machine affects all of them; medians are compared.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, full_like
from ..cluster.connect import connect
from ..cluster.roles import CenterRole
from ..cluster.setup import Setup
from ..core import rules
from ..core.backoff import wait_until
from ..core.messages import WORK, Commit
from ..transport.agreement import allgather
from ..transport.registry import resolve
from .floors import make_floor

_BLOCKS = 20  # rounds of each side


def timed(call: Callable[[], Any]) -> float:
    """Seconds that `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def barrier(comm: MPI.Comm) -> None:
    """A barrier that yields the core while it waits."""
    wait_until(comm.Ibarrier().Test)


def zeros(n: int, xp: ModuleType = np) -> Array:
    """A float32 vector (n,), allocated as in a run."""
    return full_like(xp.empty(n, np.float32), 0)


class Ours:
    """Exchanges through agnmpi, as a run makes them, without the optimizer; collective.

    Args:
        comm: ours; its first ranks serve, where any does.
        setup: how they exchange.
        x: (n,) the delta.
    """

    def __init__(self, comm: MPI.Intracomm, setup: Setup, x: Array) -> None:
        rule = rules.synchronous() if setup.transport.capabilities.together else rules.agn()
        self.role = connect(comm, rule, x, setup=setup)
        self._x, self._out = x, full_like(x, 0)
        self._sequence = 0

    def exchanges(self, count: int, pause: float = 0.0) -> list[float]:
        """Seconds of each of `count` exchanges of this worker; a center rank serves meanwhile.

        `pause`: seconds before each, in which the center goes to sleep.
        """
        self.role.begin(None, 1)
        if isinstance(self.role, CenterRole):
            self.role.serve()
            return []
        worker = self.role.workers[0]
        work = worker.end.exchange(Commit(worker.index, requests=WORK), None).wait().work
        times = []
        for _ in range(count):
            self._sequence += 1
            commit = Commit(worker.index, self._sequence, 1, work.first, requests=WORK, payload=self._x)
            time.sleep(pause)
            start = time.perf_counter()
            reply = worker.end.exchange(commit, self._out).wait()
            times.append(time.perf_counter() - start)
            work = reply.work
        worker.end.leave(None, self._out).wait()
        return times


class Case(NamedTuple):
    """A case to measure: a transport, a wire, a size, a number of workers."""

    transport: str
    wire: str
    n: int
    workers: int


def exchanges(
    comm: MPI.Intracomm, wires: Mapping[str, Sequence[str]], sizes: Sequence[int], counts: Sequence[int],
    repeats: int, xp: ModuleType = np,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time exchanges of float32 vectors; collective over `comm`, the rows are the same on every rank.

    `wires`: of each transport, those to compare; `counts`: numbers of workers beside the center, on the first ranks of
    `comm`; `repeats`: exchanges of each worker and side; `xp`: where the workers' vectors lie.
    """
    rows = []
    for workers in counts:
        for transport, names in wires.items():
            ranks = workers + 1  # an allreduce rule has no center: one worker more
            part: MPI.Intracomm = comm.Split(  # type: ignore[assignment]
                0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank
            )
            part_rows: list[dict[str, Any]] = []
            if part != MPI.COMM_NULL:
                train = resolve(transport).workers_among(ranks)
                for n in sizes:
                    for wire in names:
                        part_rows += _compare(part, Case(transport, wire, n, train), repeats, xp)
                part.Free()
            barrier(comm)
            rows += json.loads(allgather(comm, json.dumps(part_rows))[0])
    return rows


def _compare(comm: MPI.Intracomm, case: Case, repeats: int, xp: ModuleType) -> list[dict[str, Any]]:
    entry = resolve(case.transport)
    serves = comm.rank < entry.serving_ranks
    x = zeros(case.n, np if serves else xp)
    ours = Ours(comm, Setup(replace(entry, wire=case.wire)), x)
    target = zeros(case.n)
    with make_floor(entry.floor, comm, zeros(case.n)) as floor:
        times: dict[str, list[float]] = {"agnmpi": [], "floor": [], "memcpy": []}
        count = max(1, repeats // _BLOCKS)
        for block in range(_BLOCKS + 1):
            barrier(comm)
            sides = {"agnmpi": ours.exchanges(count)}
            barrier(comm)
            sides["floor"] = floor.exchanges(count)
            barrier(comm)
            # Delta and center: each is read and written once in any case.
            sides["memcpy"] = [2 * timed(lambda: np.copyto(target, floor.x)) for _ in range(count)]
            if block:  # the first only warms up
                for side, seconds in sides.items():
                    times[side] += seconds
    ours.role.close()
    by_rank = [json.loads(text) for text in allgather(comm, json.dumps(times))]
    merged = {side: [t for other in by_rank for t in other[side]] for side in times}
    floor_median = statistics.median(merged["floor"])
    rows = [_row(case, side, seconds, floor_median) for side, seconds in merged.items()]
    return [row | {"caveat": ours.role.caveat if row["side"] == "agnmpi" else ""} for row in rows]


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
