"""A serving rank's other duties: display, events, evaluations, record, checkpoints, silent workers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays.backend import Array
from ..cluster.role import Role
from ..cluster.roles import CenterRole, HoldingRole, NodeRole, ShardRole
from ..core.batches import Plan
from ..core.messages import STOP, Commit, Reply
from ..core.params import Layout
from ..recovery.checkpoint import folder, prune
from ..recovery.cut import ConsistentCut
from ..recovery.lock import lock
from ..recovery.saver import CenterSaver, center_facts, consistent_cut, state_bytes, workers_saved
from ..recovery.silent_workers import SilentWorkers
from ..reporting.record import Recorder
from ..transport.agreement import format_ranks
from .config import Config
from .evaluations import Evaluate
from .monitor import Monitor, OnEvent
from .outputs import write_config
from .session import Session


class Run(NamedTuple):
    """A run, for those who display and write it.

    Args:
        config: complete.
        plan: its batches.
        layout: of the parameters.
        data: determines the samples of each step.
        initial: (n,) the parameters of this rank before it trains.
        directory: of its files.
        session: of this rank.
        consistent: whether a checkpoint can be one consistent cut over all centers while the workers train.
        evaluate: metrics of a center variable (n,).
        name: describes a rank.
        say: prints a line.
        on_event: takes the events, as in events.jsonl.
    """

    config: Config
    plan: Plan
    layout: Layout
    data: Mapping[str, int]
    initial: Array
    directory: Path
    session: Session
    consistent: bool
    evaluate: Evaluate
    name: Callable[[int], str]
    say: Callable[[str], None]
    on_event: OnEvent = None


class Duties:
    """The duties of a center rank, or of rank 0 where all train.

    Args:
        run: the run.
        first: whether this rank grants the work, displays and writes the run; else it only saves its block, or as a
            node center reports silent workers.
        begins: the run begins here, with these lines on the display and these BLAS threads of each worker; None where a
            new center takes over.
    """

    monitor: Monitor  # of the first alone

    def __init__(self, run: Run, first: bool = True, begins: tuple[Sequence[str], Sequence[int]] | None = None) -> None:
        self.first, self._run, self._config, self._role = first, run, run.config, run.session.role
        self._noted = self._role.center.checkpoint  # steps at the newest checkpoint that an event tells of
        self._recorder: Recorder | None = None
        self._silent: SilentWorkers | None = None
        self._saver: CenterSaver | None = None
        self._cut: ConsistentCut | None = None  # where there are several centers
        if first:
            self._open(*begins or (None, ()))
        if isinstance(self._role, CenterRole) and (first or isinstance(self._role, NodeRole)):
            limit, drop = run.config.stall_limit, run.config.drop_stalled
            self._silent = SilentWorkers(self._role, run.session.members, limit, drop, run.name, run.say)
        if self._config.keep_checkpoints and self._role.stores:
            self._set_up_checkpoints()

    def committed(self, commit: Commit, c: Array) -> None:
        """A commit was applied."""
        if self.first:
            self.monitor.commit(commit, c)
            if self._saver is not None:
                self._saver.tick(c)

    def served(self, commit: Commit, reply: Reply) -> None:
        """A message was served."""
        if self._silent is not None:
            self._silent.served(commit)
        if self._recorder is not None:
            try:
                self._recorder(commit, reply)
            except OSError as error:
                self.end_record()
                self._run.say(f"WARNING: the record ends here, and cannot be replayed ({error}); training goes on")

    def tick(self, stop_signal: str | None) -> None:
        """Call between two messages; `stop_signal`: name of the signal that asks the run to stop."""
        role, center = self._role, self._role.center
        if self._cut is not None:
            self._cut.tick()
        if self._silent is not None:
            self._silent.tick()
        if stop_signal and isinstance(role, NodeRole):
            center.control = STOP  # its end tells the center above
        if not self.first:
            return
        self.monitor.tick()
        why = stop_signal or self.monitor.stop_reason
        if why and center.control != STOP:
            center.control = STOP
            self._run.say(f"{why}: the workers commit what they have done; then a checkpoint, and the end")
        if self._saver is not None:
            self._saver.writing()
        if center.checkpoint > self._noted:
            self._noted = center.checkpoint
            self.monitor.note("checkpoint", holds=center.checkpoint)
        if isinstance(role, CenterRole):
            role.end.announce(center.control, center.checkpoint)

    def save(self) -> None:
        """Begin a checkpoint now."""
        if self._saver is not None:
            self._saver.save(self._own_center())

    def save_last(self, steps: int) -> bool:
        """Write the last checkpoint, after `steps` steps, if any are; whether that has succeeded."""
        saver, self._saver = self._saver, None
        if saver is None:
            return True
        saver.save(self._own_center(), steps)
        saver.finish()
        return saver.last == folder(self._run.directory, steps)

    def keep_config(self) -> None:
        """Write the configuration again, if the run's directory was removed: without it nobody could resume."""
        if self.first and not (self._run.directory / "config.toml").exists():
            with suppress(OSError):  # whoever writes next says so
                self._run.directory.mkdir(parents=True, exist_ok=True)
                write_config(self._run.directory, self._config)

    def ended_early(self, failed: list[int], stop_signal: str | None) -> None:
        """Say that the run has ended before its work was done: failed on these ranks, or stopped by a signal."""
        run = self._run
        if failed:
            self.monitor.stop("failed", ranks=failed)
        else:
            self.monitor.stop("interrupted", signal=stop_signal or "another rank's")
        kept = self._config.keep_checkpoints
        hint = f"--resume {run.directory}" if kept else "no checkpoint was kept (keep_checkpoints = 0)"
        what = f"failed on {format_ranks(failed)}, and ended" if failed else "interrupted"
        self.monitor.say(f"{what} at step {run.session.role.center.steps} of {run.plan.steps}; {hint}")

    def prune(self) -> None:
        """Remove checkpoints older than those to keep."""
        if self.first and self._config.keep_checkpoints:
            prune(self._run.directory, self._config.keep_checkpoints, max(1, self._run.session.members.centers))

    def end_record(self) -> None:
        """The record ends: nothing more is served."""
        if self._recorder is not None:
            with suppress(OSError):
                self._recorder.close()
            self._recorder = None

    def change_role(self, role: Role) -> None:
        """This rank changes its role; the center is the same."""
        self._role = self.monitor.evaluations.role = role
        self._silent = None

    def _open(self, lines: Sequence[str] | None, threads: Sequence[int]) -> None:
        run, config, role = self._run, self._config, self._role
        run.directory.mkdir(parents=True, exist_ok=True)  # a new center may be on another host
        if lines is None:
            with suppress(OSError):  # the lost one may be about to end
                lock(run.directory)
        changed = {} if lines is None else write_config(run.directory, config)
        if config.record and lines is not None:
            self._recorder = Recorder(run.directory, role.count, threads, role.center.idle_workers_wait)
        self.monitor = Monitor(config, run.plan, role, run.directory, run.layout, run.evaluate, on_event=run.on_event)
        for line in lines or ():
            self.monitor.say(line)
        self.monitor.start(run.initial if lines is not None and not role.center.steps else None)
        if changed:
            self.monitor.note("changed", options=changed)

    def _set_up_checkpoints(self) -> None:
        """Prepare to write checkpoints."""
        run, config, role = self._run, self._config, self._role
        during = self.first and run.consistent
        if self.first and not run.consistent and (config.checkpoint_seconds or config.checkpoint_commits):
            run.say(
                "the workers sum into several centers, which nothing holds at one and the same commit: the only "
                "checkpoint is that of the end"
            )
        self._saver = CenterSaver(
            self._run.directory,
            role.center,
            self._facts,
            self._run.say,
            config.checkpoint_seconds if during else 0.0,
            config.checkpoint_commits if during else 0,
            config.keep_checkpoints,
            role.centers.rank if isinstance(role, ShardRole) else 0,
        )
        if isinstance(role, ShardRole) and run.consistent:
            serving = run.session.members.serving
            self._cut = consistent_cut(role, self._saver, run.say, lambda center: run.name(serving[center]))

    def _own_center(self) -> Array:
        """This rank's block of the center variable, or all of it."""
        assert isinstance(self._role, HoldingRole)
        return self._role.end.c

    def _facts(self) -> dict[str, Any]:
        """A checkpoint's facts beside those of the center."""
        self.keep_config()
        run, session, config = self._run, self._run.session, self._config
        nbytes = state_bytes(run.initial.nbytes, config.make_optimizer(1))
        centers, ranks = max(1, session.members.centers), session.members.workers() if session.failover else []
        return {
            **center_facts(self._role, run.layout, centers, ranks),
            "data": dict(run.data),
            "config": asdict(config),
            "states": workers_saved(config.checkpoint_workers, nbytes, self._role.count)[0],
            **(self.monitor.progress if self.first else {}),
        }
