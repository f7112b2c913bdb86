"""Durations in virtual time, drawn from given distributions, and the effect of n, λ, bytes and shards."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from heapq import heapify, heapreplace
from itertools import islice
from typing import Any

import numpy as np

from ..training.options import Refusal, check, documented, option, read_toml

Numbers = np.ndarray[Any, np.dtype[Any]]
DISTRIBUTIONS = ("constant", "normal", "exponential")
TIES = ("worker", "random")


@documented
@dataclass(frozen=True)
class Timing:
    """The options of simulations alone.

    Raises:
        ValueError: for an invalid value, with the value.
    """

    step_time: float = option(0.01, "time", "seconds of a local step, mean", float, least=0)
    step_distribution: str = option(
        "constant",
        "time",
        "of a step's time: constant; normal (below 0 counts as 0); exponential: a fixed part and an exponential tail",
        choices=DISTRIBUTIONS,
    )
    step_spread: float = option(
        0.3, "time", "standard deviation of a step's time as a part of its mean", float, least=0
    )
    speed_spread: float = option(
        0.0,
        "time",
        "spread σ of the workers' speeds: each has a factor exp(σz − σ²/2) on its step times",
        float,
        least=0,
    )
    speed_factors: str = option("", "time", "factors on the workers' step times, such as 1,1,2.5; repeated over all")
    stragglers: float = option(0.0, "time", "fraction of the workers, drawn at random, that are slower", float, least=0)
    straggler_factor: float = option(4.0, "time", "their factor on step times", float, positive=True)
    start_jitter: float = option(0.0, "time", "seconds over which the workers start, evenly at random", float, least=0)
    latency: float = option(1e-5, "time", "seconds of a message, each way", float, least=0)
    bandwidth: float = option(1e10, "time", "bytes per second of a message, each way; 0: no limit", float, least=0)
    service: float = option(1e-5, "time", "seconds in which the center serves a message", float, least=0)
    service_bandwidth: float = option(
        4e9,
        "time",
        "bytes in and out per second that the center serves, by link or memory; 0: no limit",
        float,
        least=0,
    )
    ties: str = option("worker", "time", "what comes first at the same time: the lower worker, or drawn", choices=TIES)
    time_seed: int = option(0, "time", "of all that is drawn in virtual time", int, least=0)
    parameters: int = option(1_000_000, "time", "numbers of 4 bytes, for --timing-only without a problem", int, least=1)
    exchanges: int = option(100_000, "time", "exchanges in --timing-only", int, least=1)

    def __post_init__(self) -> None:
        check(self, _REFUSALS)
        self.factors(1)

    def factors(self, workers: int) -> Numbers:
        """Factor on the step times of each worker, (n,)."""
        try:
            listed = [float(text) for text in self.speed_factors.split(",") if text.strip()] or [1.0]
        except ValueError:
            listed = [0.0]
        if not all(factor > 0 and np.isfinite(factor) for factor in listed):
            raise ValueError(f"speed_factors must be positive numbers such as 1,1,2.5, not {self.speed_factors!r}")
        rng = self.generator(0)
        factors = np.resize(listed, workers)
        factors = factors * np.exp(self.speed_spread * rng.standard_normal(workers) - self.speed_spread**2 / 2)
        factors[rng.permutation(workers)[: round(self.stragglers * workers)]] *= self.straggler_factor
        return factors

    def starts(self, workers: int) -> Numbers:
        """Seconds at which each worker starts, (n,)."""
        return self.generator(1).uniform(0, self.start_jitter, workers)

    def noise(self, steps: int = 1) -> Iterator[float]:
        """Times of `steps` steps in units of their mean, without end, one draw each.

        Of k steps with spread s: k; N(k, ks²), at least 0; k(1 − s) + s·Gamma(k), a sum of k exponential tails.
        """
        rng, s, k = self.generator(2), self.step_spread, steps
        draw: dict[str, Callable[[], Numbers]] = {
            "constant": lambda: np.full(4096, float(k)),
            "normal": lambda: np.maximum(k + s * np.sqrt(k) * rng.standard_normal(4096), 0),
            "exponential": lambda: k * (1 - s) + s * rng.standard_gamma(k, 4096),
        }
        while True:
            yield from draw[self.step_distribution]().tolist()

    def tie(self) -> Callable[[int], float]:
        """The order of events at the same time, smaller first, as a function of the worker."""
        rng = self.generator(3)
        return float if self.ties == "worker" else lambda _worker: rng.random()

    def transfer(self, nbytes: float) -> float:
        """Seconds of a transfer: latency + bytes / bandwidth."""
        return self.latency + (nbytes / self.bandwidth if self.bandwidth else 0.0)

    def serving(self, nbytes: float) -> float:
        """Seconds that a center takes for a message of `nbytes` in and out together."""
        return self.service + (nbytes / self.service_bandwidth if self.service_bandwidth else 0.0)

    def generator(self, stream: int) -> np.random.Generator:
        """A seeded generator for each random quantity."""
        return np.random.default_rng([self.time_seed, stream])


_REFUSALS: tuple[Refusal[Timing], ...] = (
    (lambda t: t.stragglers > 1, "stragglers is a fraction of the workers, from 0 to 1, not {stragglers!r}"),
    (
        lambda t: t.step_distribution == "exponential" and t.step_spread > 1,
        "the spread of an exponential tail is at most 1, not {step_spread!r}",
    ),
)


def load_timing(path: str | None, given: dict[str, Any]) -> Timing:
    """Read the table [simulation] of a TOML file, and override it with the values `given`."""
    values = read_toml(path).get("simulation", {}) if path else {}
    unknown = set(values) - {f.name for f in fields(Timing)}
    if unknown:
        raise ValueError(f"{path}: [simulation] has no option {', '.join(sorted(unknown))}")
    return Timing(**values | given)


def histogram(values: Numbers, bins: int = 50) -> dict[str, Any]:
    """Counts of integers in at most `bins` bins of equal width, from 0.

    >>> histogram(np.array([0, 1, 1, 3]))
    {'width': 1, 'counts': [1, 2, 0, 1]}
    """
    if not values.size:
        return {"width": 1, "counts": []}
    width = int(values.max()) // bins + 1
    return {"width": width, "counts": np.bincount(values // width).tolist()}


def timing_only(
    timing: Timing,
    workers: int,
    period: int,
    nbytes: int,
    pulls: str = "after",
    overlap: bool = False,
    centers: int = 1,
) -> dict[str, Any]:
    """Virtual time without gradients: a closed queueing network of n workers and a FIFO center.

    `nbytes`: of the model; `centers`: shards, each with an equal part of the bytes; `pulls`: "after", one message for
    an exchange, or "before", two. A worker asks for work, then computes λ steps, exchanges, and so on (with `overlap`
    it computes meanwhile). The shards of a message leave and arrive together, so that their queues evolve identically:
    one stands for all. The first fifth of the exchanges is not counted. With exponential step times, many
    workers, λ = 1 and a low load this is M/D/1: the mean wait is Dρ/(2(1 − ρ)) (Pollaczek 1930, Khinchine 1932).
    Raises ValueError for an overlap that pulls before.
    """
    if overlap and pulls == "before":
        raise ValueError("--timing-only does not know when an elastic rule with overlap takes up its pull: leave one")
    ask, pull, commit = range(3)
    before = pulls == "before"
    part = -(-nbytes // centers)
    outward = [timing.latency, timing.latency, timing.transfer(part)]
    back = [timing.transfer(part), timing.transfer(part), timing.latency if before else timing.transfer(part)]
    serving = [timing.serving(part), timing.serving(part), timing.serving(part if before else 2 * part)]
    first = pull if before else commit  # message of an exchange
    tie, noise = timing.tie(), timing.noise(period)
    seconds = (timing.step_time * timing.factors(workers)).tolist()
    pulled = [0] * workers  # clock at which each worker last pulled
    heap = [(at + outward[ask], tie(w), 3 * w + ask) for w, at in enumerate(timing.starts(workers).tolist())]
    heapify(heap)
    skipped = timing.exchanges // 5
    clock, free, computed, served, longest = 0, 0.0, 0.0, 0.0, 0
    staleness, waits = list[int](), list[float]()
    queue = deque[float]()  # begins of service
    warm = (0.0, 0.0, 0.0, 0)  # state after the warm-up
    while clock < timing.exchanges:
        arrival, _, code = heap[0]
        worker, kind = divmod(code, 3)
        begin = arrival if arrival > free else free
        free = begin + serving[kind]
        served += serving[kind]
        waits.append(begin - arrival)
        while queue and queue[0] <= arrival:
            queue.popleft()
        if begin > arrival:
            queue.append(begin)
            longest = max(longest, len(queue))
        answered = free + back[kind]
        if kind == pull:
            pulled[worker] = clock
            send, kind = answered, commit
        else:
            if kind == commit:
                staleness.append(clock - pulled[worker])
                clock += 1
                if clock == skipped:
                    warm = (free, computed, served, len(waits))
                    longest = 0
            pulled[worker] = clock
            work = seconds[worker] * next(noise)
            computed += work
            send = answered + work
            if overlap and kind == commit:
                send = max(arrival - outward[commit] + work, answered)
            kind = first
        heapreplace(heap, (send + outward[kind], tie(worker), 3 * worker + kind))
    span = free - warm[0]
    late = np.array(staleness[skipped:])
    return {
        "workers": workers,
        "period": period,
        "centers": centers,
        "bytes": nbytes,
        "exchanges": late.size,
        **results(
            span, late, computed - warm[1], served - warm[2], list(islice(waits, warm[3], None)), longest, workers
        ),
    }


def results(
    seconds: float, staleness: Numbers, computed: float, served: float, waits: list[float], longest: int, workers: int
) -> dict[str, Any]:
    """Results of `seconds` of virtual time; by Little's law the mean queue is Σ waits / seconds."""
    span = seconds or 1.0
    return {
        "virtual": {
            "seconds": seconds,
            "commits_per_second": staleness.size / span,
            "wait_mean": float(np.mean(waits)) if waits else 0.0,
            "queue": {"mean": sum(waits) / span, "max": longest},
            "utilisation": {"workers": computed / span / workers, "center": served / span},
        },
        "staleness": {
            "mean": float(staleness.mean()) if staleness.size else 0.0,
            "max": int(staleness.max()) if staleness.size else 0,
            "histogram": histogram(staleness),
        },
    }
