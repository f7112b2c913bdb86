"""A training job from a configuration: what `agnmpi train` does on every rank."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array, bring, current
from ..cluster.placement import blas_threads, check_world, end_sibling, limit_blas, place, process, require_equal_model
from ..cluster.probe import choose_wire
from ..cluster.roles import NodeRole
from ..cluster.setup import Setup, check_setup
from ..core.backoff import wait_until
from ..core.batches import Plan
from ..core.drive import drive
from ..core.drive import train as train_worker
from ..core.leases import Lease
from ..core.messages import Commit, Reply
from ..core.observer import Observer
from ..core.worker import Worker
from ..recovery.center_state import Saved
from ..recovery.checkpoint import newest
from ..recovery.lock import unlock_all
from ..recovery.restore import resume
from ..recovery.saver import WorkerSaver, state_bytes, workers_saved
from ..transport.agreement import ConfigError, allgather, format_ranks, raise_on_all
from .abort import forked, say_and_abort
from .config import Config, load
from .duties import Duties, Run
from .exits import DEGRADED, UNWRITTEN, Degraded, Failed, Interrupted, Signals, Unwritten
from .fault_injection import Injection, read_faults
from .monitor import Monitor, OnEvent
from .outputs import finish_run, introduction, node_centers_lines, run_directory, save_center, write_result
from .problem import Factory, evaluate, gradient_of, name_of, prepare
from .session import Session
from .user_code import user_frames

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


class Job(Observer):
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
        self.config = config = raise_on_all(self.world, config.complete)
        self.rule = config.make_rule()
        transport = raise_on_all(self.world, config.make_transport)
        self.setup = Setup(transport, config.overlap, config.dylu, caller_uses_mpi=False).on_hosts(self.world)
        check_setup(self.rule, self.setup, world.size, config.make_optimizer(1), config.make_center_optimizer(1))
        self.centers = self.setup.center_ranks
        self.trains = self.rank not in self.setup.serving_ranks
        here = place(self.world, self.trains)
        limit_blas(here.threads)
        device = config.device if self.trains else config.center_device
        load = partial(prepare, config.problem, config.options, config.seed, device, here.worker_index, factory)
        self.problem, self.layout, self.x = raise_on_all(self.world, load)
        numbers = self.problem.samples, config.batch, config.epochs, config.steps, config.seed
        self.plan = raise_on_all(self.world, lambda: Plan(*numbers))
        limit_blas(here.threads)  # again, for the libraries that the problem has imported
        # Only rank 0 uses the run's directory here.
        options = {f"option {k}": repr(v) for k, v in asdict(config).items() if k not in ("run_dir", "resume")}
        require_equal_model(self.world, self.layout, {"samples": str(self.problem.samples), **options})
        faults = os.environ.get("AGNMPI_FAULTS", "") if inject else ""  # production never reads it
        self.injection = Injection(raise_on_all(self.world, lambda: read_faults(faults)), self.rank)
        self._ranks = [json.loads(text) for text in allgather(self.world, json.dumps([here.host, process()]))]
        self.session: Session
        self.duties: Duties | None = None  # at a rank that serves, or rank 0
        self.directory = Path()
        self.complete = self.interrupted = self.unwritten = False  # complete: before it was resumed
        self.failure: Exception | None = None  # of the user's code, on this rank
        self._failed = list[int]()  # ranks on which the user's code has failed
        self.result: Result | None = None
        self._worker_savers: list[WorkerSaver] = []
        self._announcements = list[str]()  # for the display, once it exists
        self._began = 0.0  # start time, less the duration before a resume

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
                    worker.end = self.injection.wrap(worker.end)
                self._set_up_worker_savers(workers)
                drive([self._steps(saver.worker, saver) for saver in self._worker_savers])
            while not self._concluded():
                if self.session.regroup():  # else no worker trains again: a rank has died after its work was done
                    break
            else:
                return self._end()

    def _connect(self) -> None:
        """Set up the session, and begin it or continue from a checkpoint."""
        config, plan = self.config, self.plan
        wire = choose_wire(self.world, self.x, self.setup.transport.wire)
        self.session = session = Session(
            self.world, self.rule, self.x, config.make_optimizer(plan.steps),
            config.make_center_optimizer(plan.steps),
            self.setup._replace(transport=replace(self.setup.transport, wire=wire)),
            self, self._newest, config.drop_stalled,
        )  # fmt: skip
        try:
            resumed = self._resume()
        except ConfigError:  # on all ranks; MPICH 5.0 complains at length of windows that are not freed
            session.close()
            raise
        threads = [int(text) for text in allgather(self.world, str(blas_threads()))] if config.record else []
        self._began = time.monotonic() - (float(resumed["seconds"]) if resumed else 0.0)
        self.duties = raise_on_all(self.world, lambda: self._begin_duties(threads))
        if resumed is not None and self.duties is not None and self.duties.first:
            self.duties.monitor.resume(int(resumed["samples"]), float(resumed["seconds"]))

    def _begin_duties(self, threads: Sequence[int]) -> Duties | None:
        """The duties of this rank, if it has any; raises OSError where the run's files cannot be opened."""
        config, plan, session = self.config, self.plan, self.session
        if self.rank:
            return Duties(self._run(), first=False) if session.role.serves else None
        centers = list(map(self.name, self.centers))
        lines = introduction(config, self.layout, plan, session.role.count, self.world.size, centers, self.setup)
        lines += node_centers_lines(config, [(self.name(node), len(of)) for node, *of in self.setup.nodes])
        if caveat := session.role.caveat:
            lines.append(f"WARNING: {caveat}")
        begins = lines + self._announcements, threads[-session.role.count :]
        return Duties(self._run(), begins=begins)

    def _run(self) -> Run:
        consistent = len(self.centers) < 2 or self.setup.transport.capabilities.single_commits
        facts = self.config, self.plan, self.layout, self.data, self.x, self.directory, self.session, consistent
        return Run(*facts, self.evaluate, self.name, self.say, self._on_event)

    def _resume(self) -> Mapping[str, Any] | None:
        """Begin, or continue from a checkpoint and return its facts; determine the directory of the run."""
        config, role, resumed = self.config, self.session.role, None
        if config.resume is not None:
            directory = partial(run_directory, config) if self.rank == 0 else None
            required = config.resume != "auto"
            resumed = resume(
                self.world, role, self.layout, self.plan.steps, self.data, directory, required,
                self._announcements.append,
            )  # fmt: skip
            self.complete = resumed is not None and role.center.settled >= self.plan.steps
        self.session.begin(self.plan.steps, config.period)
        path = raise_on_all(self.world, lambda: str(run_directory(config).resolve()) if self.rank == 0 else "")
        self.directory = Path(allgather(self.world, path)[0])
        return resumed

    def _newest(self) -> Saved | None:
        checkpoint = newest(self.directory, self.say)
        return checkpoint and checkpoint[1:]

    def _steps(self, worker: Worker, saver: WorkerSaver) -> Iterator[int]:
        """The loop of a worker: saves its state with the center, and stops on a signal where no center rank would."""
        gradient = gradient_of(self.problem, self.layout, self.plan, worker.x)

        def compute(step: int) -> tuple[float, Array]:
            self.injection.step()
            try:
                loss, g = gradient(step)
            except Exception as error:  # the user's: what is committed is saved before the job ends
                if forked():
                    say_and_abort(self.world, error)
                self._fail(step, error)
                worker.stop_all()
                raise
            self.injection.corrupt(g)
            return loss, g

        loop, asked = train_worker(worker, compute), False
        try:
            for step in loop:
                saver.tick()
                if self.signals.received and self.centers and not asked:  # it may be this rank's alone
                    asked = True
                    worker.stop_all()
                if self._stop_reason and (not self.centers or self.session.comm.size == 1):
                    loop.close()
                    break
                yield step
        except Exception as error:
            if error is not self.failure:
                raise
        worker.settle()

    @property
    def _stop_reason(self) -> str:
        """Why this rank is to stop; "" if it is not."""
        if self.signals.received or self.failure:
            return self.signals.received or str(self.failure)
        return self.duties.monitor.stop_reason if self.duties is not None and self.duties.first else ""

    def _fail(self, step: int, error: Exception) -> None:
        """The user's code has failed in `step`: say so at once, with its frames, in one write."""
        self.failure = error
        sys.stdout.flush()
        sys.stderr.write(
            f"agnmpi: {self.name(self.rank)} failed in step {step}; the others commit what they have done, then "
            f"the job ends:\nTraceback (most recent call last):\n{user_frames(error)}\n"
        )
        sys.stderr.flush()

    def _set_up_worker_savers(self, workers: Sequence[Worker]) -> None:
        """Prepare to write the local states of these workers, as configured."""
        config, count = self.config, self.session.role.count
        option = config.checkpoint_workers if config.keep_checkpoints else "none"
        when, line = workers_saved(option, state_bytes(self.x.nbytes, config.make_optimizer(1)), count)
        if line and self.rank == 0:
            self.say(line)
        for saver in self._worker_savers:  # of an earlier round, with a lost center
            saver.finish(None)
        # A probe moves all on; where ranks may die, one among them fails.
        progress = bool if self.setup.threaded else MPI.COMM_SELF.Iprobe
        self._worker_savers = [WorkerSaver(self.directory, w, count, when, self.say, progress) for w in workers]

    # Events of the session.

    def committed(self, commit: Commit, c: Array) -> None:
        """Count, display, evaluate and save."""
        if self.duties is None:
            return
        self.duties.committed(commit, c)
        if self.session.role.serves and self.duties.first:
            self.injection.step()

    def served(self, commit: Commit, reply: Reply) -> None:
        """Record; the worker is alive."""
        if self.duties is not None:
            self.duties.served(commit, reply)

    def waiting(self) -> None:
        """Update display and checkpoints; check for signals and silent workers."""
        if self.duties is not None:
            self.duties.tick(self.signals.received)

    def left(self) -> None:
        """Save before ranks are left behind."""
        if self.config.drop_stalled and self.duties is not None:
            self.duties.save()  # Open MPI 5.0 may crash if a rank dies while others are left behind

    def lost(self, rank: int, held: Sequence[Lease]) -> None:
        """Report a worker that has died."""
        role, lost = self.session.role, self.session.members.lost
        others = sum(worker not in lost for worker in self.session.members.workers())
        self.say(
            f"WARNING: {self.name(rank)} is lost, at step {role.center.steps}; what it had not committed goes to the "
            f"{others} others"
        )
        self.note("lost", rank=rank, host=self._ranks[rank][0], uncommitted=held)

    def given_up(self, lease: Lease) -> None:
        """Report steps that are given up."""
        last = lease.first + lease.steps - 1
        self.say(
            f"WARNING: steps {lease.first} to {last} gave NaN or infinity again and again, and are given up; look at "
            "their samples"
        )
        self.note("given_up", first=lease.first, steps=lease.steps)

    def failing(self, worker: int, refusals: int) -> None:
        """Name a worker whose commits are refused again and again."""
        if self.duties is None or not self.duties.first:
            return
        rank = self.session.members.rank_of(worker) if self.session.role.serves else self.rank
        self.say(f"WARNING: the last {refusals} commits of {self.name(rank)} were refused: NaN or infinity")
        self.note("failing", rank=rank, refusals=refusals)

    def missing(self, ranks: Sequence[int]) -> None:
        """Report ranks that were lost after their work was done."""
        if self.session.role.serves:
            for rank in ranks:
                self.say(f"WARNING: {self.name(rank)} is lost, after its work was done")

    def alone(self) -> None:
        """Report that no other rank is left."""
        self.say(f"WARNING: all workers are lost; rank {self.rank}, which was one, trains on alone")
        if self.duties is not None:
            self.duties.change_role(self.session.role)

    def new_center(self, source: str, newly_lost: Sequence[int]) -> None:
        """Another center has been elected; if it is this rank, it takes over the files and the display, too."""
        session = self.session
        if session.comm.rank:
            return
        role, center, leases = session.role, session.role.center, session.role.center.leases
        assert leases is not None
        self.duties = Duties(self._run())
        samples = self.plan.count(Lease(0, leases.next)) - sum(self.plan.count(lease) for lease in leases.open())
        self.duties.monitor.resume(samples, time.monotonic() - self._began)
        self.say(
            f"WARNING: {' and '.join(map(self.name, newly_lost))} {'is' if len(newly_lost) == 1 else 'are'} lost, "
            f"the center among them; {self.name(self.rank)} is the center now, from {source}, and goes on at step "
            f"{center.steps}, clock {center.clock}, " + (f"workers: {role.count}" if role.serves else "alone")
        )
        self.note("failover", lost=sorted(session.members.lost), center=self.rank, begun_from=source)

    # Output.

    @property
    def data(self) -> dict[str, int]:
        """Determines the samples of each step."""
        return {"samples": self.problem.samples, "batch": self.config.batch, "seed": self.config.seed}

    def evaluate(self, c: Array) -> Mapping[str, float]:
        """Evaluate `c` (n,), which may lie on any device, on this rank's device; in any thread."""
        with current(self.x):
            return evaluate(self.problem, self.layout.views(bring(c, self.x)))

    def name(self, rank: int) -> str:
        """The rank and its host, as text."""
        return f"rank {rank} on {self._ranks[rank][0]}"

    def say(self, line: str) -> None:
        """Print a line: on the display where this rank has one."""
        if self.duties is not None and self.duties.first:
            self.duties.monitor.say(line)
        else:
            print(f"agnmpi: rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event, if this rank writes events."""
        if self.duties is not None and self.duties.first:
            self.duties.monitor.note(event, **facts)

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
        session = self.session
        written = self._last_checkpoint()
        if self.duties is not None and self.duties.first and not self._all_lost():
            self.duties.keep_config()
            try:
                if self.interrupted:
                    save_center(self.directory, self.config, self.layout, session.role)
                else:
                    self._write_result(self.duties.monitor)
            except OSError as error:
                written = False
                self.say(f"WARNING: the result could not be written ({error})")
        # As a barrier, too: if rank 0 dies before all is written, another rank writes it.
        self.unwritten = "False" in allgather(session.comm, str(written))

    def _last_checkpoint(self) -> bool:
        """Save the final state, and find out whether the run was asked to stop; whether all of it is written here."""
        comm, role = self.session.comm, self.session.role
        if self.duties is not None:
            self.duties.end_record()
        if self.duties is not None and self.duties.first and self.duties.monitor.failure:
            self.failure = self.failure or RuntimeError("the first evaluation has failed")
        failed = self.rank if self.failure else None
        dropped = role.center.dropped if isinstance(role, NodeRole) else 0  # rank 0 has not seen these
        status = [role.center.steps, role.center.settled, self.signals.received, failed, dropped]
        statuses = [json.loads(text) for text in allgather(comm, json.dumps(status))]
        steps, settled, *_ = statuses[0]
        # Any rank may have received the signal.
        stopped_by = [name for _, _, name, *_ in statuses if name is not None]
        self._failed = [rank for *_, rank, _ in statuses if rank is not None]
        if self.rank == 0:
            role.center.dropped += sum(dropped for *_, dropped in statuses)
        self.interrupted = bool(self._failed) or (bool(stopped_by) and settled < self.plan.steps)
        if not self.interrupted:
            self.signals.over()
        for saver in self._worker_savers:
            saver.finish(steps if saver.worker in role.workers else None)
        written = self.duties is None or self.duties.save_last(steps)
        wait_until(comm.Ibarrier().Test)
        if self.duties is not None:
            self.duties.prune()  # again: now the other centers have written theirs
        return written

    def _write_result(self, monitor: Monitor) -> None:
        lost = sorted(self.session.members.lost)
        if self.result is None:
            run = self.directory, self.config, self.layout, self.session.role
            hosts = [host for host, _ in self._ranks]
            ranks = {"hosts": {host: hosts.count(host) for host in hosts}}
            self.result = finish_run(*run, monitor, lost, ranks, self.complete)
            return
        self.result["lost"] = lost  # a rank has died since
        write_result(self.directory, self.result)

    def _all_lost(self) -> bool:
        """Whether this is a center whose work is not done, and all its workers are lost."""
        return self.session.deserted and self.session.role.center.settled < self.plan.steps

    def _end(self) -> Result | None:
        """Free communicators and ends. Returns the result on rank 0."""
        session, members = self.session, self.session.members
        if session.failover is not None:  # else MPI_Abort does it, with our exit code
            for rank in members.hung:
                end_sibling(*self._ranks[rank][1])
        abort = bool(members.hung) and session.failover is None
        if self._all_lost():
            self.say(f"all workers are lost, ranks {members.lost}; resume with --resume {self.directory}")
            raise Degraded(1, abort)
        session.close()
        if self.interrupted:
            if self.duties is not None and self.duties.first:
                monitor, center = self.duties.monitor, session.role.center
                if self._failed:
                    monitor.stop("failed", ranks=self._failed)
                else:
                    monitor.stop("interrupted", signal=self.signals.received or "another rank's")
                hint = (
                    f"--resume {self.directory}"
                    if self.config.keep_checkpoints
                    else "no checkpoint was kept (keep_checkpoints = 0)"
                )
                what = f"failed on {format_ranks(self._failed)}, and ended" if self._failed else "interrupted"
                monitor.say(f"{what} at step {center.steps} of {self.plan.steps}; {hint}")
            if self._failed:
                raise Failed(format_ranks(self._failed), abort) from self.failure
        if self.unwritten and self.rank == session.members.alive[0]:
            self.say(f"WARNING: not all is on the disk that should be: exit code {UNWRITTEN}")
        if members.lost and not self.interrupted:  # MPI cannot be finalized after a rank was lost
            raise Degraded(UNWRITTEN if self.unwritten else DEGRADED, abort)
        if self.unwritten:
            raise Unwritten(abort)
        if self.interrupted:
            raise Interrupted(abort)
        session.comm.Free()
        return self.result
