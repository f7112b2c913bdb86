"""A training job from a configuration: what `agnmpi train` does on every rank."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, choose, current, device_count
from ..cluster.connect import connect
from ..cluster.model import require_equal_model
from ..cluster.placement import blas_threads, check_world, limit_blas, place, unused_devices
from ..cluster.probe import choose_wire
from ..cluster.setup import Setup, check_setup
from ..core.backoff import wait_until
from ..core.batches import Plan
from ..core.leases import Lease
from ..core.messages import LEAVE, STOP, Commit, Reply
from ..core.params import Layout
from ..core.worker import Worker, train
from ..recovery.checkpoint import newest, prune
from ..recovery.files import write_atomic
from ..recovery.membership import Membership
from ..recovery.restore import resume
from ..recovery.saver import CenterSaver, save_worker
from ..reporting.advice import advice
from ..reporting.record import Recorder
from ..transport.agreement import ConfigError, allgather, raise_on_all
from ..version import __version__, mpi_library
from .config import Config
from .drive import drive
from .exits import DEGRADED, Degraded, Interrupted
from .fault_injection import Injection, read_faults
from .monitor import Monitor
from .outputs import finish_run, repeatable, run_directory, write_result
from .problem import Problem, gradient_of, load_problem
from .signals import Signals


def run(config: Config, world: MPI.Comm, signals: Signals | None = None, inject: bool = False) -> dict[str, Any] | None:
    """Train as `config` says; collective over `world`. Returns the result on rank 0, None elsewhere.

    Raises ConfigError, on every rank, for what is refused before training, and Interrupted, on every rank, if one of
    `signals` has asked the run to stop, or Degraded if it ended with fewer ranks. `inject`: tests give faults in
    the environment variable AGNMPI_FAULTS.
    """
    return Job(config, world, signals or Signals(lambda _code: None), inject).run()


class Job:
    """A run of `agnmpi train` on this rank."""

    def __init__(self, config: Config, world: MPI.Comm, signals: Signals, inject: bool = False) -> None:
        check_world(world)
        self.comm, self.signals = world.Dup(), signals
        self.config = config = raise_on_all(self.comm, config.complete)
        self.rule = config.make_rule()
        self.setup = Setup(
            transport="rma" if config.transport == "accumulate" else config.transport,
            overlap=config.overlap,
            use_locking=config.transport != "accumulate",
            centers=config.centers,
            center_device=config.center_device,
            slots=config.message_buffers,
            workers=config.workers,
            dylu=config.dylu,
        )
        check_setup(self.rule, self.setup, self.comm, config.make_optimizer(1), config.make_center_optimizer(1))
        self.rank = self.comm.rank
        trains = not self.setup.serves or self.rank >= self.setup.centers
        here = place(self.comm, trains)
        limit_blas(here.threads)

        def prepare() -> tuple[Problem, Layout, Array, Plan]:
            xp = choose(config.device if trains else config.center_device, here.worker_index)
            problem = load_problem(config.problem, xp, config.options)
            initial = problem.init(np.random.default_rng(config.seed))
            layout = Layout.of(initial)
            plan = Plan(problem.samples, config.batch, config.epochs, config.steps, config.seed)
            return problem, layout, layout.pack(initial), plan

        self.problem, self.layout, self.x, self.plan = raise_on_all(self.comm, prepare)
        limit_blas(here.threads)  # again, for the libraries that the problem has imported
        # Where the run's directory lies is rank 0's affair.
        told = {f"option {k}": repr(v) for k, v in asdict(config).items() if k not in ("run_dir", "resume")}
        require_equal_model(self.comm, self.layout, {"samples": str(self.problem.samples), **told})
        self.monitor: Monitor | None = None
        self.recorder: Recorder | None = None
        self.saver: CenterSaver | None = None
        self.directory = Path()
        self.said = list[str]()  # lines for the monitor, once it is there
        self.interrupted = False
        self.complete = False  # before it was resumed
        self.result: dict[str, Any] | None = None
        self._began = 0.0  # time at which the training began, less what earlier turns took
        faults = os.environ.get("AGNMPI_FAULTS", "") if inject else ""  # production never reads it
        self.injection = Injection(raise_on_all(self.comm, lambda: read_faults(faults)), self.rank)
        first = self.setup.centers if self.setup.serves else 0
        limit, drop = config.stall_limit, config.drop_stalled
        self.membership = Membership(self.comm, here.host, first, limit, drop, self._say, self._note)

    def run(self) -> dict[str, Any] | None:
        """Wire, resume, train, and write the result."""
        config, comm = self.config, self.comm
        chosen = choose_wire(comm, self.x, config.wire)
        self.role = role = connect(
            comm,
            self.rule,
            self.x,
            config.make_optimizer(self.plan.steps),
            config.make_center_optimizer(self.plan.steps),
            self.setup._replace(wire=chosen),
            observe=self._observe,
            record=self._served,
        )
        self.membership.role = role
        try:
            resumed = self._take_up()
        except ConfigError:  # on all ranks; MPICH 5.0 complains at length of windows that are not freed
            role.close()
            raise
        threads = allgather(comm, str(blas_threads())) if config.record else []
        self._began = time.monotonic() - (float(resumed["seconds"]) if resumed else 0.0)
        if self.rank == 0:
            monitor = self._open([int(t) for t in threads[-role.count :]])
            if resumed is not None:
                monitor.resume(int(resumed["samples"]), float(resumed["seconds"]))
        if config.keep_checkpoints and (self.rank == 0 or role.serves):
            self._keep()
        if role.failover is not None:
            role.failover.on_center = self._new_center
            role.failover.checkpoint = self._newest
        while True:
            self._train()
            while not self._go_on():
                if self._concluded():
                    return self._end()

    def _take_up(self) -> Mapping[str, Any] | None:
        """Begin, or go on from a checkpoint, whose facts are returned; and find out where the run is written."""
        config, comm, role, resumed = self.config, self.comm, self.role, None
        if config.resume is not None:
            directory = partial(run_directory, config) if self.rank == 0 else None
            required = config.resume != "auto"
            resumed = resume(
                comm, role, self.layout, self.plan.steps, self._data(), directory, required, self.said.append
            )
            self.complete = resumed is not None and role.center.steps >= self.plan.steps
        role.begin(self.plan.steps, config.period)
        made = raise_on_all(comm, lambda: str(run_directory(config).resolve()) if self.rank == 0 else "")
        self.directory = Path(allgather(comm, made)[0])
        return resumed

    def _train(self) -> None:
        """Serve or train until all have left; a worker may do one after the other."""
        for worker in self.role.workers:
            worker.end = self.injection.wrap(worker.end)
        drive([self._steps(worker) for worker in self.role.workers])
        if self.role.serves:
            end: Any = self.role.end
            if self.role.failover is not None:
                end.on_loss = self.membership.lose
            self.role.serve(self._turn if self.monitor is not None else None)

    def _go_on(self) -> bool:
        """When all have left: whether there is a new center, and its workers are to begin once more."""
        if self.config.drop_stalled and self.saver is not None:
            self.saver.save(self._own_center())  # Open MPI 5.0 may crash if a rank dies while others are left behind
        elected, failover = self.membership.regroup(), self.role.failover
        if self._all_lost() and failover is not None and failover.worker is not None:
            self._say(f"WARNING: all workers are lost; rank {self.rank}, which was one, trains on alone")
            failover.alone()
            return True
        return elected

    def _all_lost(self) -> bool:
        """Whether this is a center whose work is not done, and all its workers are lost."""
        return self.role.serves and self.membership.comm.size == 1 and self.role.center.steps < self.plan.steps

    def _new_center(self) -> None:
        """Another center has been elected; if it is this rank, it takes over the files and the display, too."""
        membership, failover = self.membership, self.role.failover
        assert failover is not None
        gone = membership.follow()
        if membership.comm.rank:
            return
        self.role = role = membership.role
        center, leases = role.center, role.center.leases
        assert leases is not None
        monitor = self._watch()
        samples = self.plan.count(Lease(0, leases.next)) - sum(self.plan.count(lease) for lease in leases.open())
        monitor.resume(samples, time.monotonic() - self._began)
        self._say(
            f"WARNING: {' and '.join(map(membership.name, gone))} {'is' if len(gone) == 1 else 'are'} lost, the center "
            f"among them; {membership.name(self.rank)} is the center now, from {failover.source}, and goes on at step "
            f"{center.steps}, clock {center.clock}, " + (f"workers: {role.count}" if role.serves else "alone")
        )
        monitor.note("failover", lost=membership.lost, center=self.rank, begun_from=failover.source)
        if self.config.keep_checkpoints:
            self._keep()

    def _newest(self) -> tuple[Mapping[str, Array], Mapping[str, Any]] | None:
        found = newest(self.directory, self._say)
        return found and found[1:]

    def _steps(self, worker: Worker) -> Iterator[int]:
        """The loop of a worker: saves its state when the center has, and stops where nobody else would stop it."""
        gradient = gradient_of(self.problem, self.layout, self.plan, worker.x)

        def compute(step: int) -> tuple[float, Array]:
            self.injection.step()
            loss, g = gradient(step)
            self.injection.spoil(g)
            return loss, g

        loop = train(worker, compute)
        saved = worker.checkpoint
        for step in loop:
            if worker.checkpoint != saved and not worker.done:
                saved = worker.checkpoint
                save_worker(self.directory, worker, saved, self._say)
            if self.signals.asked and (not self.setup.serves or self.membership.comm.size == 1):
                loop.close()
                worker.settle()
                return
            yield step

    def _turn(self) -> None:
        """What rank 0 does beside serving, between two messages."""
        assert self.monitor is not None
        role, center = self.role, self.role.center
        self.monitor.tick()
        if self.signals.asked and center.control != STOP:
            center.control = STOP
            self._say(f"{self.signals.asked}: the workers commit what they have done; then a checkpoint, and the end")
        self.membership.tick()
        if self.saver is not None:
            self.saver.take_in()
            if self.saver.begun:
                role.save_others(self.saver.begun)
        if not self.setup.use_locking:
            end: Any = role.end
            end.tell(center.control, center.checkpoint)

    def _own_center(self) -> Array:
        """What this rank holds of the center variable."""
        return self.role.c if self.role.end is None else self.role.end.c

    def _save_block(self, steps: int) -> None:
        assert self.saver is not None
        if not self.saver.busy:  # else this checkpoint stays without our block, and is not whole
            self.saver.save(self._own_center(), steps)

    def _observe(self, commit: Commit, c: Array) -> None:
        if self.monitor is None:
            return
        self.monitor.commit(commit, c)
        if self.saver is not None:
            self.saver.tick(c)
        if self.role.serves:
            self.injection.step()

    def _served(self, commit: Commit, reply: Reply) -> None:
        self.membership.heard(commit.worker, bool(commit.requests & LEAVE))
        if self.recorder is not None:
            self.recorder(commit, reply)

    def _say(self, line: str) -> None:
        if self.monitor is not None:
            self.monitor.say(line)
        else:
            print(f"agnmpi: rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def _note(self, event: str, **facts: Any) -> None:
        if self.monitor is not None:
            self.monitor.note(event, **facts)

    def _data(self) -> dict[str, int]:
        """What says which samples each step has."""
        return {"samples": self.problem.samples, "batch": self.config.batch, "seed": self.config.seed}

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the center's own facts."""
        return {
            "agnmpi": __version__,
            "centers": self.setup.centers if self.setup.serves else 1,
            "workers": self.role.count,
            "layout": self.layout._asdict(),
            "data": self._data(),
            "config": asdict(self.config),
            "ranks": self.role.failover.served[1:] if self.role.failover else [],
            **(self.monitor.progress if self.monitor is not None else {}),
        }

    def _open(self, threads: list[int]) -> Monitor:
        """Rank 0: the files and the display of the run."""
        config, role = self.config, self.role
        write_atomic(self.directory / "config.toml", repeatable(config).to_toml().encode())
        if config.record:
            said = {"agnmpi": __version__, "workers": role.count, "blas_threads": threads}
            said["idle_workers_wait"] = role.center.idle_workers_wait
            self.recorder = Recorder(self.directory, said)
        lines = _introduction(config, self.layout, self.plan, role.count, self.comm.size) + self.said
        return self._watch(lines)

    def _watch(self, lines: Sequence[str] = ()) -> Monitor:
        """At the center that grants the work: begin to show and write what goes on."""
        self.directory.mkdir(parents=True, exist_ok=True)  # a new center may be on another host
        monitor = Monitor(self.config, self.plan, self.role, self.directory, self._evaluate)
        for line in lines:
            monitor.say(line)
        self.membership.watch()
        monitor.start()
        self.monitor = monitor
        return monitor

    def _evaluate(self, c: Array) -> Mapping[str, float]:
        """Evaluate `c` (n,) where the problem of this rank computes, wherever c lies; in any thread."""
        with current(self.x):
            return self.problem.evaluate(self.layout.views(bring(c, self.x)))

    def _keep(self) -> None:
        """At a center: keep checkpoints."""
        config, role, first = self.config, self.role, self.monitor is not None
        self.saver = CenterSaver(
            self.directory,
            role.center,
            self._facts,
            self._say,
            config.checkpoint_seconds if first else 0.0,
            config.checkpoint_commits if first else 0,
            config.keep_checkpoints,
            self.membership.comm.rank if role.serves else 0,
        )
        role.center.on_save = self._save_block

    def _last_checkpoint(self) -> None:
        """Save what all have reached, if any has a place for it; and find out whether the run was asked to stop."""
        role, center = self.role, self.role.center
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
        said = [
            json.loads(text) for text in allgather(self.membership.comm, json.dumps([center.steps, self.signals.asked]))
        ]
        steps = said[0][0]
        # Where all train, any rank may have been the one that broke off.
        heard = [name for _, name in (said[:1] if self.setup.serves else said) if name is not None]
        asked = heard[0] if heard else None
        self.interrupted = asked is not None and steps < self.plan.steps
        if self.config.keep_checkpoints:
            for worker in role.workers:
                save_worker(self.directory, worker, steps, self._say)
        if self.saver is not None:
            self.saver.save(self._own_center(), steps)
            self.saver.finish()
            self.saver = None
        wait_until(self.membership.comm.Ibarrier().Test)
        if (
            self.config.keep_checkpoints and self.monitor is not None
        ):  # once more: now the other centers have written theirs
            prune(self.directory, self.config.keep_checkpoints, self.setup.centers if self.setup.serves else 1)

    def _concluded(self) -> bool:
        """Save and write what has been reached; whether all have come through this, the same on every rank."""
        comm, failover = self.membership.comm, self.role.failover
        if failover is None:
            self._conclude()
            return True
        error, done = None, 1
        try:
            self._conclude()
        except MPI.Exception as raised:
            comm.Revoke()
            error, done = raised, 0
        with suppress(MPI.Exception):  # a rank has died: all hear of it here
            if comm.Agree(done):
                return True
        if error is not None and not comm.Get_failed().size:
            raise error  # of another kind
        return False

    def _conclude(self) -> None:
        self._last_checkpoint()
        if self.monitor is not None and not self.interrupted and not self._all_lost():
            self._result()
        if self.role.failover is not None or self.membership.lost:
            wait_until(
                self.membership.comm.Ibarrier().Test
            )  # if rank 0 dies before all is written, another one writes it

    def _end(self) -> dict[str, Any] | None:
        """Free what is held. Returns the result on rank 0."""
        role, membership = self.role, self.membership
        membership.end_hung()
        abort = bool(membership.hung) and role.failover is None
        if self._all_lost():
            self._say(f"all workers are lost, ranks {membership.lost}; resume with --resume {self.directory}")
            raise Degraded(1, abort)
        if self.interrupted:
            if not membership.lost:
                role.close()
            if self.monitor is not None:
                self.monitor.stop("interrupted", signal=self.signals.asked or "another rank's")
                resume = (
                    f"--resume {self.directory}"
                    if self.config.keep_checkpoints
                    else "no checkpoint was kept (keep_checkpoints = 0)"
                )
                self.monitor.say(f"interrupted at step {role.center.steps} of {self.plan.steps}; {resume}")
            raise Interrupted(abort)
        if membership.lost:  # who has lost a rank cannot finalize MPI
            raise Degraded(DEGRADED, abort)
        role.close()
        membership.comm.Free()
        return self.result

    def _result(self) -> None:
        role, monitor = self.role, self.monitor
        assert monitor is not None
        if self.result is None:
            self.result = finish_run(
                self.directory, self.config, self.layout, role, monitor, self.membership.lost, self.complete
            )
            return
        self.result["lost"] = self.membership.lost  # a rank has died since
        write_result(self.directory, self.result)


def _introduction(config: Config, layout: Layout, plan: Plan, workers: int, size: int) -> list[str]:
    ranks = f"{size} rank{'s' if size > 1 else ''}"
    return [
        f"agnmpi {__version__}: {config.problem}, {layout.size:,} parameters ({layout.dtype}), "
        f"{plan.samples:,} samples, {plan.steps:,} steps of {plan.batch}",
        f"rule {config.rule}, {workers} worker{'s' if workers > 1 else ''} ({ranks}), period {config.period}, "
        f"{config.optimizer} {config.rate:g}, center {config.center_optimizer}, transport {config.transport}, "
        f"{mpi_library()}",
        *advice(config.make_rule(), workers, config.period),
        *(unused_devices(device_count()) if config.device == "auto" else ()),
    ]
