"""A loop of your own with the display, events, best model, target and result of `agnmpi train`."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

import tomli_w
from mpi4py import MPI

from ..arrays.backend import Array, bring, current
from ..core.batches import Plan
from ..core.messages import STOP, Commit
from ..core.params import Layout
from ..recovery.files import write_atomic
from ..reporting.terminal import above_bar, terminals
from ..training.config import Config
from ..training.monitor import Monitor, OnEvent
from ..training.outputs import about_ranks, conclude, run_directory, summarize
from ..training.session import Session
from ..training.user_code import metrics
from ..transport.agreement import allgather, raise_on_all


@dataclass(frozen=True)
class Monitoring:
    """What rank 0 shows and writes of a loop of your own, as of `agnmpi train`: `agnmpi report` and `runs` read it.

    Args:
        directory: for events.jsonl, best.safetensors, center.safetensors and result.json. None (default): that of the
            checkpoints, if there is one, else runs/SCRIPT-DATE.
        evaluate: called with a copy of the center, by name, returns metrics by name; at first with the initial
            parameters, and last with the final ones. At rank 0, in a thread where that serves; it must not call MPI.
            If it fails later than at first, that is reported, and training goes on. None (default): no metrics.
        every: steps over all workers between two evaluations; default 1000.
        metric: NAME:max or NAME:min: the center with its best value is kept in best.safetensors.
        patience: evaluations without a better value, after which all loops end; default: any number.
        stop_at: value of the metric at which all loops end; default: none.
        samples: training samples, for epochs; default: an epoch is a loop.
        batch: samples in a step of one worker; default 1: then samples are steps.
        writers: where the numbers go, too, by commas: csv, tensorboard, wandb, mlflow.
        on_event: called at rank 0 with each event, as in events.jsonl.
    """

    directory: str | Path | None = None
    evaluate: Callable[[Mapping[str, Array]], Mapping[str, float]] | None = None
    every: int = 1000
    metric: str | None = None
    patience: int | None = None
    stop_at: float | None = None
    samples: int | None = None
    batch: int = 1
    writers: str = ""
    on_event: OnEvent = None

    @classmethod
    def of(cls, given: "Monitoring | str | Path | None") -> "Monitoring | None":
        """What is given, or its directory alone; raises TypeError for anything else."""
        if not isinstance(given, Monitoring | str | Path | None):
            raise TypeError(f"monitor must be agnmpi.Monitoring(…) or a directory, not {given!r}")
        return cls(given) if isinstance(given, str | Path) else given

    def config(self, period: int) -> Config:
        """What of it `agnmpi train` has an option for. Raises ValueError for bad values."""
        if self.every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, not {self.every}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be the number of training samples, not {self.samples}")
        if self.metric is not None and self.evaluate is None:
            raise ValueError(f"metric {self.metric!r} needs evaluate, which returns it")
        return Config(
            period=period, batch=self.batch, monitor=self.metric, patience=self.patience, stop_at=self.stop_at,
            writers=self.writers,
        )  # fmt: skip

    @property
    def ends_loops(self) -> bool:
        """Whether it may end loops early."""
        return self.patience is not None or self.stop_at is not None


class LoopMonitor:
    """Does it: what a rank of a loop shows and writes; collective where it is made, and at the end of a session.

    Args:
        given: what is asked for.
        comm: ranks that take part.
        checkpoint: directory of the checkpoints, if there is one.
        resumes: whether the loop goes on from one there, if there is any.
        options: of the loop, for the report: problem, rule, variant, transport, period among them.
        layout: of the parameters.
        x: (n,) parameters of this rank.

    Raises:
        ConfigError: on all ranks, for bad values, or a directory that holds another run.
    """

    session: Session  # of the loop

    def __init__(
        self, given: Monitoring, comm: MPI.Intracomm, checkpoint: Path | None, resumes: bool,
        options: Mapping[str, Any], layout: Layout, x: Array,
    ) -> None:  # fmt: skip
        self._given, self._options, self._layout, self._x = given, {"problem": script(), **options}, layout, x
        self._config = raise_on_all(comm, lambda: given.config(options["period"]))
        where = given.directory or checkpoint
        path = raise_on_all(comm, lambda: str(self._make(where, resumes).resolve()) if comm.rank == 0 else "")
        self.directory = Path(allgather(comm, path)[0])
        self._streams: list[str] = json.loads(allgather(comm, json.dumps(terminals()))[0]) if comm.size > 1 else []
        self._hosts = allgather(comm, MPI.Get_processor_name())
        self._monitor: Monitor | None = None  # on the rank that shows and writes
        self._has_loss = False  # where the caller moves arrays of its own, it may tell no loss
        self._noted = 0  # steps at the newest checkpoint that an event tells of
        self._seconds = self._samples = 0.0  # before the loop was resumed
        self._began = time.monotonic()
        self._total = inf  # steps up to the end of this session
        self._epoch: int | None = None  # steps of one, once that is known: a loop may have more when it is resumed
        self.stopped = ""  # why all loops have ended early, if they have; on every rank
        self._since_best = 0  # evaluations, before the loop was resumed

    def _make(self, where: str | Path | None, resumes: bool) -> Path:
        named = f":{Path(script()).stem}"
        again = "auto" if resumes and where else None
        directory = run_directory(Config(problem=named, run_dir=str(where) if where else None, resume=again))
        if not (directory / "config.toml").exists():
            write_atomic(directory / "config.toml", tomli_w.dumps(self._options).encode())
        return directory

    def resumed(self, facts: Mapping[str, Any]) -> None:
        """The loop goes on from a checkpoint with these facts."""
        self._samples, self._seconds = float(facts.get("samples", 0)), float(facts.get("seconds", 0.0))
        self._epoch = facts.get("epoch")
        if facts.get("criteria") == self._criteria:  # else it may go on
            self.stopped, self._since_best = facts.get("stopped", ""), facts.get("since_best", 0)

    @property
    def facts(self) -> Mapping[str, Any]:
        """For a checkpoint: samples and seconds so far, steps of an epoch, and what ends all loops or has."""
        facts: dict[str, Any] = {"samples": int(self._samples), "seconds": self._seconds}
        if self._monitor is not None:
            facts |= self._monitor.progress
        if self._given.ends_loops:
            facts |= {"criteria": self._criteria, "stopped": self.stopped, "since_best": self._since}
        return facts | ({"epoch": self._epoch} if self._epoch else {})

    @property
    def _since(self) -> int:
        """Evaluations since the best."""
        best = self._monitor.evaluations.best if self._monitor else None
        return best.since if best else self._since_best

    @property
    def _criteria(self) -> str:
        """What ends all loops, in words."""
        return f"{self._given.metric}, patience {self._given.patience}, stop_at {self._given.stop_at}"

    def begins(self, total: int | None, before: int) -> None:
        """A session of `total` steps begins, after `before`. RuntimeError on all ranks if it cannot end early."""
        if total is not None and self.session.rule.allreduce and self._given.ends_loops:
            raise RuntimeError(
                f"monitor: rule {self.session.rule.name} gives {total} steps to all ranks at the same time: patience "
                "and stop_at need a loop over steps() without a number"
            )
        self._total = inf if total is None else before + total
        if self.session.comm.rank == 0:
            if self._monitor is None:
                self._open(total, initial=not self.session.role.center.settled)
            else:
                self._monitor.show()
            assert self._monitor is not None
            self._monitor.total, self._monitor.before = self._total, before

    def _open(self, total: int | None, initial: bool) -> None:
        given, role = self._given, self.session.role
        one_loop = self._epoch or total or given.every
        self._epoch = per_epoch = max(1, one_loop if given.samples is None else -(-given.samples // given.batch))
        plan = Plan(given.samples or per_epoch * given.batch, given.batch, steps=total or 1)
        evaluates = given.evaluate is not None
        config = replace(self._config, evaluate_every=given.every / plan.steps_per_epoch if evaluates else 0.0)
        self._monitor = Monitor(
            config, plan, role, self.directory, self._layout, self._evaluate, on_event=given.on_event
        )
        self._monitor.total = self._total
        if (best := self._monitor.evaluations.best) is not None and not initial:
            best.since = self._since_best
        self._monitor.start(self._x if initial and evaluates else None)
        if not initial:
            self._monitor.resume(int(self._samples), self._seconds)

    def _evaluate(self, c: Array) -> Mapping[str, float]:
        function = self._given.evaluate
        if function is None:
            return {}
        with current(self._x):
            return metrics(function(self._layout.views(bring(c, self._x))), function)

    def above_bar(self) -> AbstractContextManager[None]:
        """While in it, what this rank prints goes above the bar of rank 0."""
        return above_bar(*self._streams if self.session.comm.rank else ())

    def committed(self, commit: Commit, c: Array) -> None:
        """A commit was applied, and the center is now `c` (n,)."""
        self._has_loss |= not isnan(commit.loss)
        if self._monitor is not None:
            self._monitor.commit(commit, c)

    def tick(self) -> bool:
        """Go on with what is under way; whether the loop is to end."""
        monitor, center = self._monitor, self.session.role.center
        if monitor is None:
            return False
        monitor.tick()
        if center.checkpoint > self._noted:
            self._noted = center.checkpoint
            monitor.note("checkpoint", holds=center.checkpoint)
        if monitor.stop_reason and center.control != STOP:
            monitor.say(f"{monitor.stop_reason}: the workers commit what they have done, and the loop ends")
        return bool(monitor.stop_reason)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event, where events are written."""
        if self._monitor is not None:
            self._monitor.note(event, **facts)

    def new_center(self, source: str) -> None:
        """Another rank serves: if it is this one, it goes on with all."""
        if self.session.comm.rank == 0:
            steps = self.session.role.center.steps
            self._samples, self._seconds = steps * self._given.batch, time.monotonic() - self._began
            self._open(self.session.role.total, initial=False)
            self.note(
                "failover", lost=sorted(self.session.members.lost), begun_from=source, workers=self.session.role.count
            )

    def alone(self) -> None:
        """This rank, which serves, trains on alone."""
        if self._monitor is not None:
            self._monitor.evaluations.role = self.session.role

    def settle(self) -> None:
        """Wait for an evaluation under way: the caller's model may hold a center for it; it gets the final one next."""
        if self._monitor is not None:
            self._monitor.evaluations.wait()

    def ends(self) -> None:
        """A session has ended; raises RuntimeError on all ranks if the first evaluation has failed."""
        why = ""
        if self._monitor is not None:
            self._monitor.hide()
            why = self._monitor.stop_reason
        self.stopped = next(filter(None, allgather(self.session.comm, why)), "")
        if self._monitor is not None and self._monitor.failure:
            self._monitor.stop("failed", ranks=[0])
            self._monitor = None
        if self.stopped == "the first evaluation has failed":
            raise RuntimeError(f"{self.stopped}, as rank 0 has said")

    def ended_early(self, signal: str | None) -> None:
        """A signal has ended the loop, or a failure."""
        self._since_best = self._since
        if self._monitor is not None and signal is None:
            self._monitor.stop("failed", ranks=[0])
        elif self._monitor is not None:
            self._monitor.stop("interrupted", signal=signal)
        self._monitor = None

    def finish(self) -> None:
        """For good: evaluate the final center, write and show the result."""
        if self._monitor is None:
            return
        role, lost = self.session.role, sorted(self.session.members.lost)
        extra = about_ranks(role, lost, self._hosts)
        result = conclude(self.directory, self._options, self._layout, role, self._monitor, extra)
        summarize(result, self._monitor, self._has_loss)


def script() -> str:
    """The program that runs, as a path."""
    return sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c") else "loop"
