"""`agnmpi bench MODULE:PROBLEM`: the time of a problem's own steps and of exchanges of its parameters, and advice."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from typing import NamedTuple

from mpi4py import MPI

from ..arrays.backend import Array, full_like, synchronize
from ..arrays.encodings import NAMES
from ..arrays.kernels import all_finite, set_threads
from ..cluster.machine import limit_blas
from ..cluster.placement import check_world, place, require_equal_model
from ..cluster.probe import choose_wire
from ..cluster.setup import Setup, check_setup
from ..core.ends import run_waits
from ..core.worker import Worker
from ..training.config import Config
from ..training.problem import gradient_of, plan_of, prepare
from ..transport.agreement import ConfigError, allgather, raise_on_all
from ..version import __version__, mpi_library
from .exchanges import Ours, barrier
from .periods import NoWire, Work, about_unrest, alone, by_worker, exchanging, hidden, unrest
from .recommendation import MOST, Choice, Costs, Measured, choose, conclude, confirm, recommend
from .recommendation import options as recommended_options
from .tables import milliseconds, percent, print_table, size
from .written import json_file

_ROUNDS = 3
_WARM_UP = 2  # steps, or exchanges
_PAUSE = 0.02  # seconds: a rank that waits for longer does not sleep more deeply
_LONGEST = 1000  # λ, where overlap is measured


class Options(NamedTuple):
    """What to measure; see `agnmpi bench problem --help`."""

    transports: Sequence[str]
    seconds: float
    json: str | None


class Steps(NamedTuple):
    """Seconds of a gradient, and of moving the parameters; shares of steps, where loss or gradient is not finite.

    Args:
        gradient: seconds.
        move: seconds.
        spoilt: share in which loss or gradient is not finite.
        refused: share in which the gradient is not: the center would refuse such commits.
    """

    gradient: float
    move: float
    spoilt: float = 0.0
    refused: float = 0.0


def step_times(
    worker: Worker, gradient: Callable[[int], tuple[float, Array]], seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> Steps:  # fmt: skip
    """The medians of a worker's steps; measures for `seconds`, and at least 3 steps."""
    parts = list[Steps]()
    began = now()
    for step in worker.steps():
        start = now()
        loss, g = gradient(step)
        synchronize(worker.x)
        middle = now()
        worker.local_step(g, loss)
        synchronize(worker.x)
        end = now()
        run_waits(worker.waits_after_step())
        refused = not all_finite(g)
        parts.append(Steps(middle - start, end - middle, refused or not isfinite(loss), refused))
        if len(parts) >= _WARM_UP + 3 and end - began > seconds:
            break
    gradients, moves, *shares = zip(*parts[_WARM_UP:])
    return Steps(statistics.median(gradients), statistics.median(moves), *map(statistics.fmean, shares))


def about_spoilt(share: float) -> list[str]:
    """A warning where the problem does not train as it is.

    >>> about_spoilt(0.0)
    []
    """
    if not share:
        return []
    return [
        f"WARNING: {percent(share)} of the steps gave NaN or infinity, as loss or in the gradient: a run would not "
        "train so, and the advice is about time alone. Look at the problem and its samples, or lower --rate"
    ]


def fitting(config: Config, names: Sequence[str], size: int) -> tuple[list[Config], list[str]]:
    """The configuration with each of the transports `names` that it can use, that of `auto` first; why not, of others.

    Args:
        config: as given: defaults depend on the transport.
        names: of transports.
        size: of the world.
    """
    fit, refusals, auto = list[Config](), list[str](), config.complete().transport
    for name in sorted(names, key=lambda name: name != auto):
        try:
            fit.append(_checked(config, size, transport=name))
        except ValueError as refusal:
            refusals.append(f"not measured: {name}: {refusal}")
    return fit, refusals


def usable_encodings(config: Config, size: int) -> list[str]:
    """The encodings that a run could use both for commits and for pulls; none if it uses one already."""
    usable = list[str]()
    if {config.encoding, config.pull_encoding} == {"float32"}:
        for name in NAMES:
            with suppress(ValueError):
                _checked(config, size, encoding=name, pull_encoding=name)
                usable.append(name)
    return usable if len(usable) > 1 else []


def _checked(config: Config, size: int, **changes: str) -> Config:
    """The complete `config` with `changes`; raises ValueError if a world of `size` ranks cannot run it."""
    changed = replace(config, **changes).complete()  # type: ignore[arg-type]
    optimizers = changed.make_optimizer(1), changed.make_center_optimizer(1)
    check_setup(changed.make_rule(), Setup(changed.make_transport()), size, *optimizers)
    return changed


class _Bench:
    """A problem on this rank, and what is measured of it."""

    def __init__(self, comm: MPI.Intracomm, config: Config, configs: Sequence[Config], seconds: float) -> None:
        self.comm, self.config, self.configs, self.seconds = comm, config, configs, seconds
        centers = Setup(configs[0].make_transport()).on_hosts(comm).center_ranks
        self.trains = comm.rank not in centers
        self.last = max(set(range(comm.size)).difference(centers))  # the last worker
        here = place(comm, self.trains)
        limit_blas(here.threads)
        set_threads(here.threads)  # as a session does
        device = config.device if self.trains else config.center_device
        load = partial(prepare, config.problem, config.options, config.seed, device, here.worker_index)
        problem, layout, x = raise_on_all(comm, load)
        plan = raise_on_all(comm, lambda: plan_of(problem, config))
        limit_blas(here.threads)  # again, for the libraries that the problem has imported
        options = {f"option {k}": repr(v) for k, v in asdict(config).items()}
        require_equal_model(comm, layout, {"samples": str(problem.samples), **options})
        optimizers = config.make_optimizer(plan.steps), config.make_center_optimizer(plan.steps)
        rule = replace(config, outer_rate=None).make_rule()  # for all transports: a weight costs no time
        self.work = Work(x, gradient_of(problem, layout, plan, x), rule, *optimizers)
        self.unrest = 0.0  # the worst that was seen
        self.hosts = len(set(allgather(comm, here.host)))

    def steps(self) -> Steps:
        """Of steps where all workers compute, the mean over them."""
        barrier(self.comm)
        work, parts = self.work, list[Steps]()
        if self.trains:
            worker = Worker(work.x, work.rule, work.optimizer, NoWire(work.x.copy(), self.config.period), 0)
            parts.append(step_times(worker, work.gradient, self.seconds))
        everyone = [tuple(part) for text in allgather(self.comm, json.dumps(parts)) for part in json.loads(text)]
        return Steps(*map(statistics.fmean, zip(*everyone)))

    def setup(self, config: Config) -> Setup:
        """How to exchange."""
        transport = config.make_transport()
        wire = choose_wire(self.comm, self.work.x, transport)
        return Setup(replace(transport, wire=wire), caller_uses_mpi=False).on_hosts(self.comm)

    def exchanges(self, setup: Setup) -> list[tuple[float, float]]:
        """Seconds of an exchange of the last worker alone, after a pause, and of each where all do nothing else.

        Of the parameters, and of one number with each center, in turn.
        """
        together = setup.transport.capabilities.together
        sizes = self.work.x.size, setup.transport.centers
        sides = [Ours(self.comm, setup, full_like(self.work.x[:numbers], 0)) for numbers in sizes]
        counts = [self._counts(ours) for ours in sides]
        seen: list[tuple[list[float], list[float]]] = [([], []) for _ in sides]
        pauses = together or self.comm.rank == self.last  # the likeliest to be on another host than the center
        for _ in range(_ROUNDS):
            for ours, (many, few), (one, all_at_once) in zip(sides, counts, seen):
                if not together:
                    all_at_once += ours.exchanges(many)
                barrier(self.comm)
                one += ours.exchanges(few if pauses else 0, _PAUSE)
                barrier(self.comm)
        for ours in sides:
            ours.role.close()
        barrier(self.comm)
        return [(self._over_workers(one), self._over_workers(one if together else many)) for one, many in seen]

    def _counts(self, ours: Ours) -> tuple[int, int]:
        """How many exchanges a round has, one after the other and with pauses; these warm up as well."""
        first = self._over_workers(ours.exchanges(_WARM_UP + 1)[_WARM_UP:])
        barrier(self.comm)
        many, few = (min(max(int(self.seconds / _ROUNDS / s), 2), 70) for s in (first, first + _PAUSE))
        return many, few

    def _over_workers(self, times: Sequence[float]) -> float:
        """The mean over workers of the medians of their times."""
        own = [statistics.median(times)] if times else []
        return statistics.fmean(by_worker(self.comm, [own]))

    def periods(self, setups: Sequence[Setup], period: int, seconds: float) -> list[float]:
        """Mean seconds of periods without exchanges, and with each of `setups`; a period takes about `seconds`."""
        count = min(max(int(self.seconds / _ROUNDS / seconds), 3), 200)
        sides: list[list[list[float]]] = [[] for _ in range(len(setups) + 1)]
        for _ in range(_ROUNDS):
            sides[0].append(alone(self.comm, self.work, self.trains, period, count))
            for side, setup in zip(sides[1:], setups):
                side.append(exchanging(self.comm, setup, self.work, period, count))
        self.unrest = max(self.unrest, unrest(self.comm, sides[0]))
        return [statistics.fmean(by_worker(self.comm, rounds)) for rounds in sides]

    def hidden(self, setup: Setup, step: float, exchange: float) -> float | None:
        """The share of an exchange that overlap hides, in periods in which as much is computed as exchanged."""
        period = min(max(round(exchange / step), 1), _LONGEST)
        return hidden(*self.periods([setup, setup._replace(overlap=True)], period, period * step + exchange))

    def waiting(self, choice: Choice, step: float) -> tuple[float | None, float]:
        """The share of their time for which workers wait with this choice, None where periods are too long to try; and
        the machine's unrest.
        """
        if choice.period * step > self.seconds:
            return None, self.unrest
        config = next(config for config in self.configs if config.transport == choice.costs.transport)
        setup = self.setup(config)._replace(overlap=choice.overlap)
        compute, wall = self.periods([setup], choice.period, choice.period * step)
        return 1 - compute / wall, self.unrest

    def costs(self, config: Config, step: float) -> Costs:
        """What exchanges by the transport of `config` cost."""
        setup = self.setup(config)
        transport = setup.transport
        (one, all_at_once), single = self.exchanges(setup)
        workers, together = transport.workers_among(self.comm.size), transport.capabilities.together
        whole = transport.capabilities.single_commits
        costs = Costs(transport.name, workers, together, one, all_at_once, whole, None, *single)
        if costs.waiting(step) < MOST:
            return costs
        return costs._replace(hidden=self.hidden(setup, step, all_at_once))


def main(comm: MPI.Intracomm, config: Config, options: Options) -> int:
    """Measure, print times and advice on rank 0, and write JSON; collective."""
    check_world(comm)
    if comm.size == 1:
        raise ConfigError("one rank has nobody to exchange with; type: mpiexec -n 3 python -m agnmpi bench PROBLEM")
    if not options.seconds > 0:
        raise ConfigError(f"--seconds must be positive, not {options.seconds}")
    if config.node_centers:
        raise ConfigError("bench measures exchanges of workers with the center: leave out node_centers")
    write = json_file(comm, options.json)
    comm = comm.Dup()
    given, config = config, raise_on_all(comm, config.complete)
    configs, refusals = fitting(given, options.transports, comm.size)
    if not configs:
        raise ConfigError("\n".join(refusals))
    bench = _Bench(comm, config, configs, options.seconds)
    gradient, move, spoilt, refused = bench.steps()
    if refused == 1:
        raise ConfigError("every gradient holds NaN or infinity: look at the problem and its samples, or lower --rate")
    costs = [bench.costs(other, gradient + move) for other in configs]
    x, centers = bench.work.x, bench.setup(configs[0]).transport.centers
    measured = Measured(gradient + move, x.size, x.itemsize, config.period, bench.hosts, centers, costs)
    trials = confirm(choose(measured), lambda choice: bench.waiting(choice, measured.step))
    choice, waiting = trials[-1]
    if comm.rank == 0:
        chosen = next(other for other in configs if other.transport == choice.costs.transport)
        lines = recommend(measured, choice, chosen.make_rule(), usable_encodings(chosen, comm.size))
        lines += [*conclude(measured, trials), *about_unrest(bench.unrest), *about_spoilt(spoilt)]
        _show(measured, gradient, move, refusals, lines)
        report = {
            "agnmpi": __version__, "mpi": mpi_library(), "world": comm.size, "gradient_seconds": gradient,
            "optimizer_seconds": move, **measured._asdict(), "costs": [cost._asdict() for cost in costs],
            "advice": lines, "options": recommended_options(measured, choice), "waiting": waiting,
            "unrest": bench.unrest, "not_finite": spoilt,
        }  # fmt: skip
        write(json.dumps(report, indent=2) + "\n")
    comm.Free()
    return 0


def _show(measured: Measured, gradient: float, move: float, refusals: Sequence[str], advice: Sequence[str]) -> None:
    from ..reporting.terminal import console as make_console

    console = make_console()
    vector = size(measured.numbers * measured.number_bytes)
    console.print(f"agnmpi {__version__}, {mpi_library()}, hosts: {measured.hosts}", markup=False)
    console.print(
        f"your step: {milliseconds(gradient + move)}; gradient {milliseconds(gradient)}, optimizer "
        f"{milliseconds(move)}; parameters: {measured.numbers:,}, {vector}",
        markup=False,
    )
    lines = [
        [
            costs.transport, str(costs.workers), milliseconds(costs.alone), milliseconds(costs.all_at_once),
            milliseconds(costs.one_alone), f"{2e-6 * measured.numbers * measured.number_bytes / costs.alone:,.1f}",
            str(costs.smallest_period(measured.step)), percent(costs.hidden),
            "-" if costs.hidden is None else str(costs.smallest_period(measured.step, overlap=True)),
        ]
        for costs in measured.costs
    ]  # fmt: skip
    columns = "transport", "n", "alone", "all at once", "1 number", "MB/s", "λ", "hidden", "λ overlap"
    title = f"exchanges, and the smallest λ for which workers wait less than {100 * MOST:.0f} % of their time"
    print_table(console, title, columns, lines, left=("transport",))
    for line in [*refusals, *advice]:
        console.print(line, markup=False)
