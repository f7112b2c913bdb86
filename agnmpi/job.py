"""A training job from a configuration: what `agnmpi train` does on every rank."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from . import agree, launch
from .backend import Array, choose, device_count
from .checkpoint import save, write_atomic
from .config import Config
from .data import Plan
from .monitor import Monitor
from .params import Layout
from .probe import choose_wire
from .problem import Problem, absolute, load_problem
from .record import Recorder
from .transport.base import Commit, Reply
from .version import __version__
from .wiring import Setup, check_fit, connect
from .worker import Worker, train


def library() -> str:
    """Name and version of the MPI library, in one line."""
    line = MPI.Get_library_version().replace("\0", "").split("\n")[0]
    return " ".join(line.split(", package")[0].replace("Version:", "").split())


def run_directory(config: Config) -> Path:
    """Make the run's directory; raises FileExistsError rather than write over another run."""
    name = config.problem.rpartition(":")[2].lower()
    path = Path(config.run) if config.run else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (path / "config.toml").exists():
        raise FileExistsError(f"{path} holds another run; give another --run, or remove it")
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(config: Config, world: MPI.Comm) -> dict[str, Any] | None:
    """Train as `config` says; collective over `world`. Returns the result on rank 0, None elsewhere.

    Raises ConfigError, on every rank, for what is refused before training.
    """
    launch.check_world(world)
    comm = world.Dup()
    config = agree.together(comm, config.complete)
    rule, transport = config.make_rule(), config.transport
    setup = Setup(
        transport=transport,
        overlap=config.overlap,
        use_locking=config.use_locking,
        centers=config.centers,
        center_device=config.center_device,
        slots=config.slots,
        workers=config.workers,
        dylu=config.dylu,
    )
    check_fit(rule, setup, comm, config.make_optimizer(1), config.make_center_optimizer(1))
    trains = not setup.serves or comm.rank >= setup.centers
    here = launch.place(comm, trains)
    launch.limit_blas(here.threads)

    def prepare() -> tuple[Problem, Layout, Array, Plan]:
        xp = choose(config.device if trains else config.center_device, here.worker_index)
        problem = load_problem(config.problem, xp, config.options)
        initial = problem.init(np.random.default_rng(config.seed))
        layout = Layout.of(initial)
        plan = Plan(problem.samples, config.batch, config.epochs, config.steps, config.seed)
        return problem, layout, layout.pack(initial), plan

    problem, layout, x, plan = agree.together(comm, prepare)
    launch.limit_blas(here.threads)  # again, for the libraries that the problem has imported
    # The run's directory is rank 0's alone.
    told = {f"option {key}": repr(value) for key, value in asdict(config).items() if key != "run"}
    launch.agree_on_model(comm, layout, {"samples": str(problem.samples), **told})

    monitor: Monitor | None = None
    recorder: Recorder | None = None

    def observe(commit: Commit, c: Array) -> None:
        if monitor is not None:
            monitor.commit(commit, c)

    def record(commit: Commit, reply: Reply) -> None:
        if recorder is not None:
            recorder(commit, reply)

    setup = setup._replace(wire=choose_wire(comm, x, config.wire))
    member = connect(
        comm,
        rule,
        x,
        config.make_optimizer(plan.steps),
        config.make_center_optimizer(plan.steps, setup.count(comm.size)),
        setup,
        observe=observe if comm.rank == 0 else None,
        record=record if comm.rank == 0 and config.record else None,
    )
    workers = member.count
    member.begin(plan.steps, config.period)
    threads = agree.allgather(comm, str(launch.blas_threads())) if config.record else []
    directory = agree.together(comm, lambda: run_directory(config) if comm.rank == 0 else None)
    if comm.rank == 0:
        assert directory is not None
        write_atomic(directory / "config.toml", repeatable(config).to_toml().encode())
        if config.record:
            said = {"agnmpi": __version__, "workers": workers, "blas_threads": [int(t) for t in threads[-workers:]]}
            recorder = Recorder(directory, said)
        monitor = Monitor(config, plan, member, directory, lambda c: problem.evaluate(layout.views(c)))
        for line in _introduction(config, layout, plan, workers, comm.size):
            monitor.say(line)
        monitor.start()
    if member.serves:
        member.serve(monitor.tick if monitor else None)
    else:
        launch.drive([train(worker, gradient_of(problem, layout, plan, worker)) for worker in member.workers])
    if recorder is not None:
        recorder.close()
    result = None
    if monitor is not None:
        assert directory is not None
        meta = {"agnmpi": __version__, "clock": str(member.center.clock), "rule": config.rule}
        save(directory / "center.safetensors", layout.views(member.c), meta)  # before the evaluation, which may fail
        result = {
            "problem": config.problem,
            "rule": config.rule,
            "variant": config.variant,
            "transport": transport,
            "workers": workers,
            "period": config.period,
            **monitor.finish(member.c),
            "mpi": library(),
            "agnmpi": __version__,
        }
        write_atomic(directory / "result.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
        if result["loss"] is None or None in result["metrics"].values():
            monitor.say("WARNING: the loss or a metric is not finite: the run has diverged; lower the rate")
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in monitor.metrics.items())
        monitor.say(
            f"done: {metrics}; {result['samples']} samples in {result['seconds']:.1f} s "
            f"({result['samples_per_second']:.0f}/s), {result['commits']} commits, "
            f"staleness {result['staleness']['mean']:.2f} (max {result['staleness']['max']})"
        )
        if result["dropped"]:
            monitor.say(f"{result['dropped']} commits were too old and were dropped; their steps were done again")
        monitor.say(f"written to {directory}/")
    member.close()
    comm.Free()
    return result


def repeatable(config: Config) -> Config:
    """The configuration without what must differ when it is repeated."""
    return replace(config, problem=absolute(config.problem), run=None)


def _introduction(config: Config, layout: Layout, plan: Plan, workers: int, size: int) -> list[str]:
    ranks = f"{size} rank{'s' if size > 1 else ''}"
    return [
        f"agnmpi {__version__}: {config.problem}, {layout.size:,} parameters ({layout.dtype}), "
        f"{plan.samples:,} samples, {plan.steps:,} steps of {plan.batch}",
        f"rule {config.rule}, {workers} worker{'s' if workers > 1 else ''} ({ranks}), period {config.period}, "
        f"{config.optimizer} {config.rate:g}, center {config.center_optimizer}, transport {config.transport}, "
        f"{library()}",
        *launch.advice(config.make_rule(), workers, config.period),
        *(launch.unused_devices(device_count()) if config.device == "auto" else ()),
    ]


def gradient_of(
    problem: Problem, layout: Layout, plan: Plan, worker: Worker, g: Array | None = None
) -> Callable[[int], tuple[float, Array]]:
    """Return what gives loss and gradient of a step at the worker's x; `g` (n,) holds the gradient, or a new vector."""
    views, g = layout.views(worker.x), worker.x.copy() if g is None else g

    def gradient(step: int) -> tuple[float, Array]:
        loss, gradients = problem.gradient(views, plan.indices(step))
        layout.pack(gradients, out=g)
        return float(loss), g

    return gradient
