"""Times of workers' periods: with an exchange at the end of each, and without any.

What a period takes longer with exchanges than without is what the exchange costs: waiting, and the processor time that
communication takes from computing.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple

from mpi4py import MPI

from ..arrays.backend import Array, synchronize
from ..arrays.kernels import set_threads
from ..cluster.placement import place
from ..cluster.setup import Setup, check_setup
from ..core.ends import Done, Handle, WorkerEnd
from ..core.leases import Lease
from ..core.messages import Commit, Reply
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..core.worker import Worker
from ..training.session import Session
from ..transport.agreement import allgather
from .exchanges import barrier
from .tables import percent

_DROPPED = 2  # periods at the start: connections are made, and with overlap no exchange is under way yet
_LEAST = 0.01  # of a period: an exchange that costs less is lost in the noise, and so is what overlap hides of it
_RESTLESS = 0.05


class NoWire(WorkerEnd):
    """An end that replies at once: only forming the delta and adopting the center remain.

    Args:
        c: the center that is pulled first, and does not change; None: nothing is pulled, x takes any value.
        period: λ.
    """

    def __init__(self, c: Array | None = None, period: int = 1) -> None:
        self._c, self._period, self._next = c, period, 0

    def exchange(self, _commit: Commit, out: Array | None) -> Handle:
        """Grant the next lease."""
        if self._c is not None and out is not None and not self._next:
            out[...] = self._c
        self._next += self._period
        return Done(Reply(0, work=Lease(self._next - self._period, self._period)))

    def pull(self, _out: Array) -> Handle:
        """Leave the center as it was pulled."""
        return Done(Reply(0))

    def leave(self, _commit: Commit | None, _out: Array | None) -> Handle:
        """Leave."""
        return Done(Reply(0))


class Work(NamedTuple):
    """What each worker computes.

    Args:
        x: (n,) parameters of this rank, moved in place.
        gradient: `gradient(step) -> (loss, g)` at x.
        rule: of exchange.
        optimizer: of the worker.
        center_optimizer: None adds.
    """

    x: Array
    gradient: Callable[[int], tuple[float, Array]]
    rule: Rule
    optimizer: Optimizer | None = None
    center_optimizer: Optimizer | None = None


def period_times(
    worker: Worker, gradient: Callable[[int], tuple[float, Array]], period: int, count: int,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:  # fmt: skip
    """Seconds of each of the first `count` periods of `worker`, which leaves then, and waits for the others."""
    stamps = [now()]
    with closing(worker.steps()) as steps:
        for taken, step in enumerate(steps, 1):
            loss, g = gradient(step)
            worker.step(g, loss)
            if taken % period:
                continue
            synchronize(worker.x)
            stamps.append(now())
            if len(stamps) > count:
                break
    worker.settle()
    return [end - start for start, end in pairwise(stamps)]


def mean_period(times: Sequence[float]) -> list[float]:
    """The mean in steady state, of a rank that trains; empty where none was timed.

    >>> mean_period([9.0, 9.0, 1.0, 3.0]), mean_period([])
    ([2.0], [])
    """
    return [statistics.fmean(times[_DROPPED:])] if times else []


def alone(comm: MPI.Comm, work: Work, trains: bool, period: int, count: int) -> list[float]:
    """This rank's mean period without exchanges, beside the others'; empty unless it `trains`; collective."""
    barrier(comm)
    set_threads(place(comm, trains).threads)  # as a session does
    times = []
    if trains:
        worker = Worker(work.x, work.rule, work.optimizer, NoWire(work.x.copy(), period), 0)
        times = period_times(worker, work.gradient, period, count + _DROPPED)
    barrier(comm)
    return mean_period(times)


def exchanging(comm: MPI.Intracomm, setup: Setup, work: Work, period: int, count: int) -> list[float]:
    """This rank's mean period with exchanges; empty where it serves; collective over `comm`, which is ours."""
    barrier(comm)
    check_setup(work.rule, setup, comm.size, work.optimizer, work.center_optimizer)
    session = Session(comm, work.rule, work.x, work.optimizer, work.center_optimizer, setup, Observer())
    session.begin(None, period)
    times = list[float]()
    for workers in session.rounds():
        for worker in workers:
            times += period_times(worker, work.gradient, period, count + _DROPPED)
    session.close()
    barrier(comm)
    return mean_period(times)


def by_worker(comm: MPI.Comm, rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median over rounds, of each worker; the same on every rank.

    Args:
        comm: the ranks; collective.
        rounds: what each round gave on this rank: a mean, or nothing where it does not train.
    """
    own = [seconds for times in rounds for seconds in times]
    everyone = [json.loads(text) for text in allgather(comm, json.dumps(own))]
    return [statistics.median(times) for times in everyone if times]


def unrest(comm: MPI.Comm, rounds: Sequence[Sequence[float]]) -> float:
    """How much the same differs between rounds: (longest − shortest)/shortest, of the worst worker.

    Args:
        comm: the ranks; collective.
        rounds: as of `by_worker`.
    """
    own = [seconds for times in rounds for seconds in times]
    spread = max(own) / min(own) - 1 if own else 0.0
    return max(float(text) for text in allgather(comm, repr(spread)))


def about_unrest(spread: float) -> list[str]:
    """A warning where the results are not to be believed.

    >>> about_unrest(0.01)
    []
    """
    if spread < _RESTLESS:
        return []
    return [
        "WARNING: this machine is busy with other things: the same steps without exchanges differ by "
        f"{percent(spread)} between rounds; smaller differences between rows mean nothing"
    ]


def utilisations(compute: Sequence[float], periods: Sequence[float]) -> list[float]:
    """Compute over wall time, of each worker.

    >>> utilisations([0.9, 1.0], [1.0, 2.0])
    [0.9, 0.5]
    """
    return [busy / wall for busy, wall in zip(compute, periods, strict=True)]


def hidden(compute: float, plain: float, overlapped: float, noise: float = _LEAST) -> float | None:
    """The share of an exchange that overlap hides: 1 − (period − compute)/(exchange without overlap).

    Args:
        compute: seconds of a period without exchanges.
        plain: with exchanges.
        overlapped: with exchanges and overlap.
        noise: of a period, the share in which an exchange is lost.

    Returns:
        1 where all is hidden; negative where overlap costs more than it hides; None where there is nothing to hide.

    >>> hidden(1.0, 2.0, 1.25), hidden(1.0, 1.0, 1.1), hidden(1.0, 1.2, 1.1, noise=0.3)
    (0.75, None, None)
    """
    exchange = plain - compute
    return None if exchange < max(noise, _LEAST) * compute else 1 - (overlapped - compute) / exchange
