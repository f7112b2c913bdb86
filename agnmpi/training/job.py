"""A training job from a configuration: what `agnmpi train` does on every rank."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array, bring, current, empty_like
from ..cluster.machine import blas_threads, limit_blas
from ..cluster.placement import check_world, require_equal_model
from ..cluster.probe import choose_wire
from ..cluster.roles import NodeRole
from ..cluster.setup import Setup, check_setup
from ..core.backoff import wait_until
from ..core.drive import drive
from ..core.drive import train as train_worker
from ..core.worker import Worker
from ..recovery.checkpoint import newest_state
from ..recovery.lock import unlock_all
from ..recovery.restore import resume
from ..recovery.saver import WorkerSaver, state_bytes, workers_saved
from ..reporting.terminal import above_bar, terminals
from ..transport.agreement import ConfigError, allgather, format_ranks, raise_on_all
from .abort import forked, say_and_abort
from .config import Config, load
from .duties import Run
from .exits import DEGRADED, UNWRITTEN, Degraded, Failed, Interrupted, Signals, Unwritten
from .fault_injection import Injection, read_faults
from .monitor import Monitor, OnEvent
from .outputs import finish_run, run_directory, save_center, write_result
from .problem import Batches, Factory, data_of, evaluate, gradient_of, leases_ahead, name_of, plan_of, prepare
from .run_observer import RunObserver
from .session import Session
from .user_code import remarks, report_failure

Result: TypeAlias = dict[str, Any]  # as in result.json


def train(
    problem: Config | str | Factory,
    comm: MPI.Intracomm | None = None,
    signals: Signals | None = None,
    inject: bool = False,
    *,
    on_event: OnEvent = None,
    **options: Any,
) -> Result | None:
    """Train as `agnmpi train` does; collective over `comm`.

    Args:
        problem: a class such as `Problem`, or its name, MODULE:PROBLEM; or a whole `Config`.
        comm: ranks that take part; it is duplicated. Default: all.
        signals: signals that ask the run to stop; default: none.
        inject: inject the faults in the environment variable AGNMPI_FAULTS, for tests; default False.
        on_event: called at the center with each event, as it is written to events.jsonl; one that raises is reported,
            and not called again.
        **options: of `Config`, such as epochs=10, period=3; what the problem is made with is options={...}.

    Returns:
        The result on rank 0, as in result.json; None elsewhere.

    Raises:
        ConfigError: on every rank, for an invalid configuration, before training.
        Interrupted: on every rank, if one of `signals` has asked the run to stop.
        Unwritten: on every rank, if the last checkpoint or the result could not be written.
        Failed: on every rank, if the problem's code has failed on one: the cause there.
        Degraded: on every surviving rank, if ranks were lost.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    factory = problem if callable(problem) else None

    def configure() -> Config:
        if isinstance(problem, Config):
            return replace(problem, **options)
        return load(None, {"problem": name_of(factory) if factory else problem, **options})

    config = raise_on_all(comm, configure)
    return Job(config, comm, signals or Signals(lambda _code: None), inject, factory, on_event).run()


class Job:
    """A run of `agnmpi train` on this rank: a configuration, a session, and its output files."""

    def __init__(
        self,
        config: Config,
        world: MPI.Intracomm,
        signals: Signals,
        inject: bool = False,
        factory: Factory | None = None,
        on_event: OnEvent = None,
    ) -> None:
        check_world(world)
        self._on_event = on_event
        self.world, self.signals, self.rank = world.Dup(), signals, world.rank
        given, config = config, raise_on_all(self.world, config.complete)
        self.rule = config.make_rule()
        exchange = raise_on_all(self.world, config.make_transport), config.overlap, config.dylu
        self.setup = Setup(*exchange, caller_uses_mpi=False, wait=config.wait).on_hosts(self.world)
        check_setup(self.rule, self.setup, world.size, config.make_optimizer(1), config.make_center_optimizer(1))
        train = sum(not self.setup.is_spare(rank, world.size) for rank in self.setup.workers(world.size))
        self.config = config = given.complete(max(train, config.workers))
        here = self.setup.place(self.world)
        limit_blas(here.threads)
        device = config.center_device if self.rank in self.setup.serving_ranks else config.device
        load = partial(prepare, config.problem, config.options, config.seed, device, here.worker_index, factory)
        self.problem, self.layout, self.x = raise_on_all(self.world, load)
        if self.setup.is_spare(self.rank, world.size):
            self.x = empty_like(self.x)  # it holds no model until it is called: what nobody writes takes no memory
        self.plan = raise_on_all(self.world, lambda: plan_of(self.problem, config))
        self.data = data_of(self.plan, config)
        limit_blas(here.threads)  # again, for the libraries that the problem has imported
        # Only rank 0 uses the run's directory here.
        options = {f"option {k}": repr(v) for k, v in asdict(config).items() if k not in ("run_dir", "resume")}
        require_equal_model(self.world, self.layout, {"samples": str(self.plan.samples), **options})
        faults = os.environ.get("AGNMPI_FAULTS", "") if inject else ""  # production never reads it
        self.injection = Injection(raise_on_all(self.world, lambda: read_faults(faults)), self.rank)
        about = json.dumps([here.host, terminals()])
        hosts, self._terminals = zip(*map(json.loads, allgather(self.world, about)))
        self.observer = RunObserver(self.rank, hosts, signals, self.injection)
        self.directory = Path()
        self.complete = self.interrupted = self.unwritten = False  # complete: before it was resumed
        self.failure: Exception | None = None  # of the user's code, on this rank
        # Ranks on which the user's code has failed; for the display, once it exists.
        self._failed, self._announcements = list[int](), remarks(self.problem.gradient)
        self.result: Result | None = None
        self._worker_savers: list[WorkerSaver] = []

    def run(self) -> Result | None:
        """Connect, resume, train, and write the result."""
        try:
            return self._run_all()
        finally:
            unlock_all()

    def _run_all(self) -> Result | None:
        self._connect()
        while True:
            for workers in self.session.rounds():
                for worker in workers:
                    worker.ahead = leases_ahead(self.problem, self.rule, self.config.record)
                    worker.end = self.injection.wrap(worker.end)
                self._set_up_worker_savers(workers)
                with above_bar(*self._terminals[0] if self.rank else ()):
                    drive([self._steps(saver.worker, saver) for saver in self._worker_savers])
            while not self._concluded():
                if self.session.regroup():  # else no worker trains again: a rank has died after its work was done
                    break
            else:
                return self._end()

    def _connect(self) -> None:
        """Set up the session, and begin it or continue from a checkpoint."""
        config, plan = self.config, self.plan
        wire = choose_wire(self.world, self.x, self.setup.transport)
        self.session = session = Session(
            self.world, self.rule, self.x, config.make_optimizer(plan.steps),
            config.make_center_optimizer(plan.steps),
            self.setup._replace(transport=replace(self.setup.transport, wire=wire)),
            self.observer, lambda: newest_state(self.directory, self.observer.say), config.drop_stalled,
        )  # fmt: skip
        self.observer.session = session
        try:
            resumed = self._resume()
        except ConfigError:  # on all ranks; MPICH 5.0 complains at length of windows that are not freed
            session.close()
            raise
        threads = [int(text) for text in allgather(self.world, str(blas_threads()))] if config.record else []
        raise_on_all(self.world, lambda: self._begin(resumed, threads))

    def _begin(self, resumed: Mapping[str, Any] | None, threads: Sequence[int]) -> None:
        """Take up the duties of this rank; raises OSError where the run's files cannot be opened."""
        observer = self.observer
        consistent = len(self.setup.center_ranks) < 2 or self.setup.transport.capabilities.single_commits
        facts = self.config, self.plan, self.layout, self.data, self.x, self.directory, self.session, consistent
        run = Run(*facts, self.evaluate, observer.name, observer.say, self._on_event)
        observer.begin(run, self.setup, resumed, self._announcements, threads)

    def _resume(self) -> Mapping[str, Any] | None:
        """Begin, or continue from a checkpoint and return its facts; determine the directory of the run."""
        config, role, resumed = self.config, self.session.role, None
        if config.resume is not None:
            directory = partial(run_directory, config) if self.rank == 0 else None
            resumed = resume(
                self.world, role, self.layout, self.plan.steps, self.data, directory, config.resume != "auto",
                self._announcements.append,
            )  # fmt: skip
            self.complete = resumed is not None and role.center.settled >= self.plan.steps
        self.session.begin(self.plan.steps, config.period)
        path = raise_on_all(self.world, lambda: str(run_directory(config).resolve()) if self.rank == 0 else "")
        self.directory = Path(allgather(self.world, path)[0])
        return resumed

    def _steps(self, worker: Worker, saver: WorkerSaver) -> Iterator[int]:
        """The loop of a worker: saves its state with the center, and stops on a signal where no center rank would."""
        batches = Batches(self.problem, self.plan, worker.x, lambda: worker.held.numbers, self.config.period)
        gradient = gradient_of(self.problem, self.layout, self.plan, worker.x, batches=batches)

        def compute(step: int) -> tuple[float, Array]:
            self.injection.step()
            try:
                loss, g = gradient(step)
            except Exception as error:  # the user's: what is committed is saved before the job ends
                if forked():
                    say_and_abort(self.world, error)
                self.failure = error
                report_failure(self.observer.name(self.rank), step, error)
                worker.stop_all()
                raise
            self.injection.corrupt(g)
            return loss, g

        loop, asked = train_worker(worker, compute), False
        try:
            for step in loop:
                saver.tick()
                if self.signals.received and self.setup.center_ranks and not asked:  # it may be this rank's alone
                    asked = True
                    worker.stop_all()
                if self._stop_reason and (not self.setup.center_ranks or self.session.comm.size == 1):
                    loop.close()
                    break
                yield step
        except Exception as error:
            if error not in (self.failure, self.observer.failure):
                raise
        batches.close()
        worker.settle()

    @property
    def _stop_reason(self) -> str:
        """Why this rank is to stop; "" if it is not."""
        if self.signals.received or self.failure:
            return self.signals.received or str(self.failure)
        return self.observer.monitor.stop_reason if self.observer.monitor is not None else ""

    def _set_up_worker_savers(self, workers: Sequence[Worker]) -> None:
        """Prepare to write the local states of these workers, as configured."""
        config, count = self.config, self.session.role.count
        option = config.checkpoint_workers if config.keep_checkpoints else "none"
        when, line = workers_saved(option, state_bytes(self.x.nbytes, config.make_optimizer(1)), count)
        if line and self.rank == 0:
            self.observer.say(line)
        for saver in self._worker_savers:  # of an earlier round, with a lost center
            saver.finish(None)
        # A probe moves all on; where ranks may die, one among them fails.
        progress = bool if self.setup.threaded else MPI.COMM_SELF.Iprobe
        facts = count, when, self.observer.say, progress
        self._worker_savers = [WorkerSaver(self.directory, worker, *facts) for worker in workers]

    def evaluate(self, c: Array) -> Mapping[str, float]:
        """Evaluate `c` (n,), which may lie on any device, on this rank's device; in any thread."""
        with current(self.x):
            return evaluate(self.problem, self.layout.views(bring(c, self.x)))

    def _concluded(self) -> bool:
        """Save and write the results; whether all ranks have succeeded, the same on every rank."""
        session = self.session
        if session.failover is None:
            self._conclude()
            return True
        error, done = None, 1
        try:
            self._conclude()
        except MPI.Exception as raised:
            session.comm.Revoke()
            error, done = raised, 0
        with suppress(MPI.Exception):  # a rank has died: Agree reports it on all
            if session.comm.Agree(done):
                return True
        if error is not None and not session.comm.Get_failed().size:
            raise error  # of another kind
        return False

    def _conclude(self) -> None:
        session, duties = self.session, self.observer.duties
        written = self._last_checkpoint()
        if duties is not None and duties.first and not self._all_lost():
            duties.keep_config()
            try:
                if self.interrupted:
                    save_center(self.directory, self.config.rule, self.layout, session.role)
                else:
                    self._write_result(duties.monitor)
            except OSError as error:
                written = False
                self.observer.say(f"WARNING: the result could not be written ({error})")
        # As a barrier, too: if rank 0 dies before all is written, another rank writes it.
        self.unwritten = "False" in allgather(session.comm, str(written))

    def _last_checkpoint(self) -> bool:
        """Save the final state, and find out whether the run was asked to stop; whether all of it is written here."""
        comm, role, duties = self.session.comm, self.session.role, self.observer.duties
        center = role.center
        if duties is not None:
            duties.end_record()
        self.failure = self.failure or self.observer.failure
        dropped = center.dropped if isinstance(role, NodeRole) else 0  # rank 0 has not seen these
        failed = self.rank if self.failure else None
        status = [center.steps, center.settled, self.signals.received, failed, dropped, self.observer.fell_short]
        statuses = [json.loads(text) for text in allgather(comm, json.dumps(status))]
        steps, settled, *_, fell_short = statuses[0]
        # Any rank may have received the signal.
        stopped_by = [name for _, _, name, *_ in statuses if name is not None]
        self._failed = [rank for *_, rank, _, _ in statuses if rank is not None]
        if fell_short and not stopped_by and not self._failed:
            self._failed = [self.session.members.alive[0]]
            if comm.rank == 0:
                self.failure = RuntimeError(fell_short)
                self.observer.say(f"WARNING: {fell_short}")
        if self.rank == 0:
            center.dropped += sum(dropped for *_, dropped, _ in statuses)
        self.interrupted = bool(self._failed) or (bool(stopped_by) and settled < self.plan.steps)
        if not self.interrupted:
            self.signals.over()
        for saver in self._worker_savers:
            saver.finish(steps if saver.worker in role.workers else None)
        written = duties is None or duties.save_last(steps)
        wait_until(comm.Ibarrier().Test)
        if duties is not None:
            duties.prune()  # again: now the other centers have written theirs
        return written

    def _write_result(self, monitor: Monitor) -> None:
        lost = sorted(self.session.members.lost)
        if self.result is None:
            run = self.directory, self.config, self.layout, self.session.role
            self.result = finish_run(*run, monitor, lost, self.observer.hosts, self.complete)
            return
        self.result["lost"] = lost  # a rank has died since
        write_result(self.directory, self.result)

    def _all_lost(self) -> bool:
        """Whether this is a center whose work is not done, and all its workers are lost."""
        return self.session.deserted and self.session.role.center.settled < self.plan.steps

    def _end(self) -> Result | None:
        """Free communicators and ends. Returns the result on rank 0."""
        session, members, duties = self.session, self.session.members, self.observer.duties
        session.end_lost()
        abort = bool(members.hung) and session.failover is None
        if self._all_lost():
            self.observer.say(f"all workers are lost, ranks {members.lost}; resume with --resume {self.directory}")
            raise Degraded(1, abort)
        session.close()
        if not members.lost:
            session.comm.Free()
        if self.interrupted:
            if duties is not None and duties.first:
                duties.ended_early(self._failed, self.signals.received)
            if self._failed:
                raise Failed(format_ranks(self._failed), abort) from self.failure
        if self.unwritten and self.rank == session.members.alive[0]:
            self.observer.say(f"WARNING: not all is on the disk that should be: exit code {UNWRITTEN}")
        if members.lost and not self.interrupted:  # MPI cannot be finalized after a rank was lost
            raise Degraded(UNWRITTEN if self.unwritten else DEGRADED, abort)
        if self.unwritten:
            raise Unwritten(abort)
        if self.interrupted:
            raise Interrupted(abort)
        return self.result
