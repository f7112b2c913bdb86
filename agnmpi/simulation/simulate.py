"""Virtual-time runs of the same workers, rules and center as over MPI, in one process."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from ..arrays.backend import Array, full_like
from ..arrays.encodings import get
from ..cluster.machine import blas_threads
from ..cluster.role import Role
from ..core.center import Center
from ..core.division import rounds
from ..core.drive import session
from ..core.ends import Handle, WorkerEnd
from ..core.leases import Leases, SpeedProportional
from ..core.messages import STOP, Commit, Reply
from ..core.params import parts
from ..core.worker import Worker
from ..recovery.files import write_atomic
from ..reporting import record
from ..reporting.advice import advice
from ..reporting.events import json_safe
from ..training.config import Config
from ..training.monitor import Monitor, format_metrics
from ..training.outputs import conclude, dropped_lines, headline, repeatable, run_directory
from ..training.problem import evaluate, gradient_of, plan_of, prepare
from ..transport.composed import EncodedHandle, encode
from ..transport.local import LocalCenter
from ..transport.registry import refusals_of_encodings, refusals_of_going_on
from ..version import __version__
from .network import Agenda, Meeting, MeetingWorker, Station, VirtualHandle, VirtualWorker
from .timing import Timing, results, timing_only


class _Whole(Role):
    """A role whose center variable is `c` (n,), whatever the centers."""

    def __init__(self, center: Center, count: int, c: Array) -> None:
        super().__init__(center, [], count)
        self._c = c

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._c


class Stage:
    """The common part of simulation and replay: problem, centers, workers and files; what drives them differs.

    Raises ValueError for an invalid configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config = config.complete()
        centers = _number_of_centers(config)
        self.rule, n = config.make_rule(), config.workers
        refusals = refusals_of_encodings(self.rule, config.encoding, config.pull_encoding)
        refusals += [] if config.wait else refusals_of_going_on(self.rule, config.make_transport())
        for refused, message in refusals:
            if refused:
                raise ValueError(message)
        if self.rule.allreduce and (config.dylu or config.record or centers > 1):
            raise ValueError(f"rule {self.rule.name} has no center: leave out dylu, record and centers")
        self.problem, layout, self.x = prepare(config.problem, config.options, config.seed, config.device, 0)
        self.layout = layout
        self.plan = plan_of(self.problem, config)
        encodings = config.encoding, config.pull_encoding
        if self.rule.allreduce and encodings != ("float32", "float32"):
            raise ValueError(
                f"encodings {encodings} with rule {self.rule.name} are not simulated: take a rule that has a center"
            )
        block = max(get(name).block for name in encodings)  # a multiple of the other: each is a power of 2
        blocks = -(-layout.size // block)
        if centers > blocks:
            raise ValueError(
                f"{centers} centers for a model of {layout.size} numbers: each needs at least one"
                + (f" block of {block} encoded numbers" if block > 1 else "")
            )
        self.c = full_like(self.x, self.x)
        cut = parts(blocks, centers)
        self.parts = [slice(part.start * block, min(part.stop * block, layout.size)) for part in cut]
        optimizer = config.make_center_optimizer(self.plan.steps)
        self.centers = [Center(self.rule, self.c[part], n, optimizer) for part in self.parts]
        self.leases = Leases(self.plan.steps, config.period)
        if not self.rule.allreduce:
            self.centers[0].leases = self.leases
        self.locals = [
            LocalCenter(self.c[p], n, partial(self.apply, i), config.pull_encoding) for i, p in enumerate(self.parts)
        ]
        self.staleness: list[int] = []
        self._monitor: Monitor | None = None
        self._recorder: record.Recorder | None = None
        self.directory = run_directory(config)

    def apply(self, i: int, commit: Commit, c: Array) -> Reply | None:
        """Apply `commit` at center `i`, whose block of the center variable is `c`, and note it."""
        center = self.centers[i]
        before = center.clock
        reply = center.apply(commit, c)
        if reply is None:
            return None
        if i == 0 and center.clock > before:
            self.staleness += [before - commit.clock] * commit.commits
            if self._monitor is not None:
                self._monitor.commit(commit, self.c)
                if self._monitor.stop_reason:
                    center.control = STOP
        if i == 0 and self._recorder is not None:
            self._recorder(commit, reply)
        return reply

    def sessions(self, end: Callable[[int], WorkerEnd]) -> list[Iterator[int | Handle]]:
        """A session for each worker, with the end `end(index)`."""
        optimizer, g = self.config.make_optimizer(self.plan.steps), self.x.copy()
        sessions = list[Iterator[int | Handle]]()
        for i in range(self.config.workers):
            encoded = encode(end(i), self.x, self.config.encoding, self.config.pull_encoding)
            overlap, wait = self.config.overlap, self.config.wait
            worker = Worker(full_like(self.x, self.x), self.rule, optimizer, encoded, i, overlap, wait=wait)
            worker.total = self.plan.steps
            # One vector for all gradients: each is used before the next is computed.
            sessions.append(session(worker, gradient_of(self.problem, self.layout, self.plan, worker.x, g)))
        return sessions

    def play(
        self,
        drive: Callable[[], None],
        lines: list[str],
        extra_results: Callable[[], dict[str, Any]],
        table: str = "",
        stamp: Callable[[], dict[str, float]] = dict,
    ) -> dict[str, Any]:
        """Let `drive` run the workers, and write the result.

        `lines`: messages about the run; `extra_results()`: further parts of the result; `table`: further lines of
        config.toml.
        """
        config, layout, plan = self.config, self.layout, self.plan
        directory = self.directory
        write_atomic(directory / "config.toml", (repeatable(config).to_toml() + table).encode())
        role = _Whole(self.centers[0], config.workers, self.c)
        monitor = Monitor(
            config, plan, role, directory, layout, lambda c: evaluate(self.problem, layout.views(c)), stamp
        )
        if config.record:
            waits = self.centers[0].idle_workers_wait
            self._recorder = record.Recorder(directory, config.workers, [blas_threads()], waits)
        monitor.say(
            f"{headline(config, layout, plan)}; rule {config.rule}, {config.workers} workers, period "
            f"{config.period}, {config.optimizer} {config.rate:g}, center {config.center_optimizer}"
        )
        for line in lines + advice(self.rule, config.workers, config.period, config.adds):
            monitor.say(line)
        self._monitor = monitor
        monitor.start(self.c)
        try:
            if monitor.failure:
                raise RuntimeError(monitor.stop_reason)
            drive()
        except Exception:
            monitor.stop("failed", ranks=[0])
            raise
        if self._recorder is not None:
            self._recorder.close()
        extra = {"transport": "virtual", "centers": len(self.parts), **json_safe(extra_results())}
        result = conclude(directory, asdict(repeatable(config)), layout, role, monitor, extra)
        monitor.say(
            f"done: {format_metrics(monitor.metrics, ', ')}; {result['samples']} samples, {result['commits']} commits "
            f"in {result['seconds']} s"
        )
        for line in summary_lines(result):
            monitor.say(line)
        monitor.say(f"written to {directory}/")
        return result


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Lines about virtual time and staleness, as far as `result` has them."""
    lines = []
    if virtual := result.get("virtual"):
        used = virtual["utilisation"]
        lines.append(
            f"virtual time {virtual['seconds']:.6g} s, {virtual['commits_per_second']:.6g} commits/s; busy: workers "
            f"{used['workers']:.1%}, center {used['center']:.1%}; queue {virtual['queue']['mean']:.2f} "
            f"(max {virtual['queue']['max']}), wait {virtual['wait_mean']:.3g} s"
        )
    if staleness := result.get("staleness"):
        lines.append(f"staleness {staleness['mean']:.2f} (max {staleness['max']})")
    lines += dropped_lines(result)
    if "same_bits" in result:
        verdict = {True: "the same bits as", False: "NOT the same bits as", None: "nothing to compare with:"}
        lines.append(f"center: {verdict[result['same_bits']]} {result['replayed']}/center.safetensors")
    return lines


def simulate(config: Config, timing: Timing = Timing()) -> dict[str, Any]:  # noqa: B008
    """Train n = `config.workers` workers and their center in virtual time, in this process.

    Args:
        config: the run, as for `train`; transport "local".
        timing: durations of steps and messages.

    Returns:
        The result, as in result.json.

    Raises:
        ValueError: before anything is written, for an invalid configuration.
        RuntimeError: if the first evaluation fails.
    """
    return run(config, timing)()


def run(config: Config, timing: Timing) -> Callable[[], dict[str, Any]]:
    """Prepare n = `config.workers` workers and their center in virtual time; call the result to run them.

    A worker's local step takes the time that `timing` draws; a message the latency, its transfer, its wait in the
    center's queue (first come, first served) and its service. With an Allreduce rule all meet in rounds instead.
    Bitwise reproducible. Raises ValueError, before anything is written, for an invalid configuration.
    """
    stage, n = Stage(config), config.workers
    agenda = Agenda(timing.tie())
    stage.centers[0].idle_workers_wait = True
    if config.dylu:
        stage.leases.pace = SpeedProportional(config.period, lambda: agenda.now)
    stations = [Station(agenda, local, timing) for local in stage.locals]
    if stage.rule.allreduce:
        leases = [rounds(stage.plan.steps, config.period, worker, n) for worker in range(n)]
        meeting = Meeting(agenda, stage.c, partial(stage.apply, 0), leases, timing)
        sessions = stage.sessions(lambda i: MeetingWorker(i, meeting))
    else:
        sessions = stage.sessions(lambda i: VirtualWorker(i, stations, stage.parts))
    seconds, noise = (timing.step_time * timing.factors(n)).tolist(), timing.noise()
    computed = 0.0

    def advance(worker: int) -> None:
        nonlocal computed
        for item in sessions[worker]:  # a step's number, or a handle
            if isinstance(item, int):
                duration = seconds[worker] * next(noise)
                computed += duration
                agenda.at(agenda.now + duration, worker, partial(advance, worker))
                return
            handle = item.handle if isinstance(item, EncodedHandle) else item
            assert isinstance(handle, VirtualHandle)
            if not handle.test():
                handle.then = partial(advance, worker)
                return

    def drive() -> None:
        for worker, start in enumerate(timing.starts(n).tolist()):
            agenda.at(start, worker, partial(advance, worker))
        agenda.run()

    def extra_results() -> dict[str, Any]:
        first = stations[0]  # the queues of all shards evolve identically
        return results(agenda.now, np.array(stage.staleness), computed, first.served, first.waits, first.longest, n)

    import tomli_w

    table = "\n" + tomli_w.dumps({"simulation": asdict(timing)})
    lines = [
        f"virtual time: steps {timing.step_distribution} {timing.step_time:g} s, message {timing.latency:g} s + bytes "
        f"/ {timing.bandwidth:g}, service {timing.service:g} s + bytes / {timing.service_bandwidth:g}, centers "
        f"{config.centers}"
    ]
    return lambda: stage.play(drive, lines, extra_results, table, lambda: {"virtual_seconds": agenda.now})


def _number_of_centers(config: Config) -> int:
    if config.node_centers:
        raise ValueError("node_centers is not simulated: leave it out")
    if isinstance(config.centers, str):
        raise ValueError("centers = 'hosts', but a simulation has no hosts: give their number, such as --centers 4")
    return config.centers


def network(config: Config, timing: Timing) -> dict[str, Any]:
    """Virtual time without gradients: throughput and staleness of `config.workers` workers; see `timing_only`."""
    nbytes = 4 * timing.parameters
    config = config.complete()
    rule = config.make_rule()
    if config.dylu:
        raise ValueError("--timing-only gives all workers the same λ: leave dylu")
    if not config.wait:
        raise ValueError("--timing-only takes λ steps for each exchange: leave --no-wait, or simulate a problem")
    if rule.allreduce:
        raise ValueError(f"rule {rule.name} has no center: --timing-only is of rules with one")
    if config.problem:
        _, layout, _ = prepare(config.problem, config.options, config.seed, config.device, 0)
        nbytes = layout.size * np.dtype(layout.dtype).itemsize
    return {
        "rule": rule.name,
        **timing_only(
            timing, config.workers, config.period, nbytes, rule.pulls, config.overlap, _number_of_centers(config)
        ),
        "agnmpi": __version__,
    }
