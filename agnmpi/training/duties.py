"""What a rank that serves does beside serving: display, events, evaluations, record, checkpoints, silent workers."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..arrays.backend import Array
from ..cluster.roles import CenterRole, ShardRole
from ..core.messages import LEAVE, STOP, Commit, Reply
from ..recovery.checkpoint import prune
from ..recovery.cut import ConsistentCut, MPIMail
from ..recovery.files import write_atomic
from ..recovery.saver import CenterSaver
from ..recovery.silent_workers import SilentWorkers
from ..reporting.record import Recorder
from ..version import __version__
from .monitor import Monitor
from .outputs import repeatable

if TYPE_CHECKING:
    from .job import Job


class Duties:
    """The duties of a center rank, or of rank 0 where all train.

    Args:
        job: whose.
        threads: BLAS threads of each worker, for the record of a run.
        first: whether this rank grants the work, shows and writes the run; else it only saves its block.
    """

    monitor: Monitor  # of the first alone

    def __init__(self, job: "Job", threads: list[int] | None = None, first: bool = True) -> None:
        self.first, self._job = first, job
        self._config, self._role = job.config, job.session.role
        self._recorder: Recorder | None = None
        self._silent: SilentWorkers | None = None
        self._saver: CenterSaver | None = None
        self._cut: ConsistentCut | None = None  # where there are several centers
        if first:
            self._open(threads)
        if self._config.keep_checkpoints:
            self._keep()

    def committed(self, commit: Commit, c: Array) -> None:
        """A commit was applied."""
        if self.first:
            self.monitor.commit(commit, c)
            if self._saver is not None:
                self._saver.tick(c)

    def served(self, commit: Commit, reply: Reply) -> None:
        """A message was served."""
        if self._silent is not None:
            self._silent.heard(commit.worker)
            if commit.requests & LEAVE:
                self._silent.excused(commit.worker)
        if self._recorder is not None:
            self._recorder(commit, reply)

    def tick(self, asked: str | None) -> None:
        """Between two messages; `asked`: the signal that asks the run to stop."""
        role, center = self._role, self._role.center
        if self._cut is not None:
            self._cut.tick()
        if not self.first:
            return
        self.monitor.tick()
        if asked and center.control != STOP:
            center.control = STOP
            self._job.say(f"{asked}: the workers commit what they have done; then a checkpoint, and the end")
        if self._silent is not None:
            self._silent.tick()
        if self._saver is not None:
            self._saver.writing()
        if isinstance(role, CenterRole):
            role.end.tell(center.control, center.checkpoint)

    def save(self) -> None:
        """Begin a checkpoint now."""
        if self._saver is not None:
            self._saver.save(self._own_center())

    def save_last(self, steps: int) -> None:
        """Write the last checkpoint, after `steps` steps."""
        if self._saver is not None:
            self._saver.save(self._own_center(), steps)
            self._saver.finish()
            self._saver = None

    def prune(self) -> None:
        """Remove what is older than the checkpoints to keep."""
        if self.first and self._config.keep_checkpoints:
            prune(self._job.directory, self._config.keep_checkpoints, max(1, self._job.serving_ranks))

    def end_record(self) -> None:
        """The record ends: nothing more is served."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _open(self, threads: list[int] | None) -> None:
        job, config, role = self._job, self._config, self._role
        job.directory.mkdir(parents=True, exist_ok=True)  # a new center may be on another host
        if threads is not None:
            write_atomic(job.directory / "config.toml", repeatable(config).to_toml().encode())
        if config.record and threads is not None:
            facts = {"agnmpi": __version__, "workers": role.count, "blas_threads": threads}
            self._recorder = Recorder(job.directory, facts | {"idle_workers_wait": role.center.idle_workers_wait})
        self.monitor = Monitor(config, job.plan, role, job.directory, job.evaluate)
        for line in job.introduction() if threads is not None else ():
            self.monitor.say(line)
        if isinstance(role, CenterRole):
            self._silent = SilentWorkers(
                role, job.session.members, config.stall_limit, config.drop_stalled, job.name, job.say
            )
        self.monitor.start()

    def _keep(self) -> None:
        """Keep checkpoints."""
        config, role = self._config, self._role
        self._saver = CenterSaver(
            self._job.directory,
            role.center,
            self._facts,
            self._job.say,
            config.checkpoint_seconds if self.first else 0.0,
            config.checkpoint_commits if self.first else 0,
            config.keep_checkpoints,
            self._job.session.comm.rank if role.serves else 0,
        )
        if not isinstance(role, ShardRole):
            return
        saver, whole = self._saver, self._job.setup.transport.capabilities.single_commits
        self._cut = ConsistentCut(
            MPIMail(role.centers),
            role.end if whole else None,
            role.center,
            lambda number: saver.save(role.end.c, number),
            saver.writing,
            self._job.say,
        )
        if self.first:
            saver.cut, role.before_leaving = self._cut, self._cut.finish

    def _own_center(self) -> Array:
        """What this rank holds of the center variable."""
        return self._role.end.c if isinstance(self._role, CenterRole) else self._role.c

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the center's own facts."""
        job, session = self._job, self._job.session
        return {
            "agnmpi": __version__,
            "centers": max(1, job.serving_ranks),
            "workers": self._role.count,
            "consistent": job.serving_ranks < 2 or job.setup.transport.capabilities.single_commits,
            "layout": job.layout._asdict(),
            "data": job.data,
            "config": asdict(self._config),
            "ranks": session.members.workers() if session.failover else [],
            **(self.monitor.progress if self.first else {}),
        }
