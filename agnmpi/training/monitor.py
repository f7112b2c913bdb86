"""Rank 0's display and log files of a run: progress, events, evaluations, the result."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf, nan
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import BarColumn, TextColumn

from ..arrays.backend import Array
from ..cluster.role import Role
from ..core.backoff import Every
from ..core.batches import Plan
from ..core.center import SummedCenter
from ..core.messages import Commit
from ..core.params import Layout
from ..reporting.events import JsonLines, Pace, RecentMean, RecentRates, json_safe
from ..reporting.goodput import goodput
from ..reporting.runs import digits, duration, read_events
from ..reporting.terminal import Bar, console
from ..reporting.writers import Event, Writers
from .config import Config
from .evaluations import Best, Evaluate, Evaluation, Evaluations, Point

OnEvent: TypeAlias = Callable[[Event], object] | None


class Monitor:
    """Watches the commits of a run at the rank that applies them.

    `commit` follows each applied commit, `tick` may be called at any time; neither blocks: evaluations run in
    a thread, on a copy of the center, and the next is postponed while one is under way. Where the rank also trains
    (`serves` is false), they run between steps, so that a problem need not be thread-safe. `stamp` returns further
    fields of each event.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        role: Role,
        directory: Path,
        layout: Layout,
        evaluate: Evaluate,
        stamp: Callable[[], Mapping[str, Any]] = dict,
        on_event: OnEvent = None,
    ) -> None:
        self._center, self._stamp, self._config, self._plan = role.center, stamp, config, plan
        self.total: float = plan.steps  # of the run; infinite where nobody knows
        self.before = 0  # steps before those that are numbered from 0 now
        self._loss = RecentMean(plan.steps_per_epoch)
        self._samples = 0
        self._rates = RecentRates()
        self._log = Every(seconds=config.log_every)
        self._line = Every(seconds=10.0)
        best = Best(config, layout, directory) if config.monitor else None
        every = config.evaluate_every * plan.steps_per_epoch
        self.evaluations = Evaluations(role, evaluate, every, best, self._evaluated)
        self.metrics: Mapping[str, float] = {}
        self.failed_evaluations = 0
        self.failure = ""  # of the first evaluation: the run is to end
        self._start = time.monotonic()
        self._pace = Pace(self._start, self._center.settled)
        self.console = console()
        self._live = self.console.is_terminal
        self._writers = Writers(directory, config.writer_names, on_event, self.say)
        self._file = directory / "events.jsonl"
        self._events = JsonLines(self._file, self._writers.write, self.say)
        self._done = dict[int, list[int]]()  # steps and commits, by worker
        self._done_at = 0.0  # seconds at the last event with these
        self._new_bar()

    def _new_bar(self) -> None:
        """A bar for what comes: one that was stopped would begin by erasing lines above it (rich 15)."""
        self._progress = Bar(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=self._bar_total, epoch=self._epochs(), facts="", left="")

    @property
    def _bar_total(self) -> float | None:
        return self.total if self.total < inf else None

    def say(self, line: str) -> None:
        """Print a line, with the date where the output is not a terminal."""
        stamp = "" if self._live else time.strftime("%Y-%m-%d %H:%M:%S ")
        style = "bold yellow" if line.startswith("WARNING") else None
        with suppress(OSError):  # the output, too, may go to a full disk
            self.console.print(stamp + line, style=style, markup=False, soft_wrap=True)

    def start(self, initial: Array | None = None) -> None:
        """The training begins; from these parameters (n,), which are evaluated first, unless it goes on."""
        self._start = time.monotonic()
        self._pace = Pace(self._start, self._center.settled)
        self._rate()
        self._events.write("start", workers=self.evaluations.role.count, period=self._config.period)
        self.show()
        if initial is not None:
            self.evaluations.first(initial, Point(0, 0, nan))

    def show(self) -> None:
        """Show the bar, where the output is a terminal."""
        if self._live:
            self._new_bar()
            self._progress.start()
            self.console.show_cursor(True)  # a killed run must not leave the cursor hidden

    def hide(self) -> None:
        """Leave the bar as it is now."""
        if self._live:
            self._update_bar(self._rate())
            self._progress.stop()

    def resume(self, samples: int, seconds: float) -> None:
        """The run continues, after `samples` and `seconds` before it was resumed."""
        self._samples = samples
        self._start -= seconds
        self._rates = RecentRates()
        self._pace = Pace(time.monotonic(), self._center.settled)
        self._rate()
        self.evaluations.resumed(self._center.steps)
        self._events.write("resume", step=self._center.steps, clock=self._center.clock)

    @property
    def progress(self) -> dict[str, float]:
        """The run's progress, for a checkpoint."""
        return {"samples": self._samples, "seconds": round(time.monotonic() - self._start, 3)}

    @property
    def stop_reason(self) -> str:
        """Why the run is to stop; "" if it is not."""
        return "the first evaluation has failed" if self.failure else self.evaluations.stop

    @property
    def trained(self) -> bool:
        """Whether it has seen any step: a center that took over when all was done has not."""
        return not self._loss.empty

    def note(self, event: str, **facts: Any) -> None:
        """Write an event."""
        self._events.write(event, step=self._center.steps, clock=self._center.clock, **facts)

    def stop(self, event: str, **facts: Any) -> None:
        """The run ends early: close the display and the files."""
        self.hide()
        self.evaluations.close()
        self._write_workers(last=True)
        self._events.write(event, step=self._center.steps, clock=self._center.clock, **facts)
        self._close()

    def _close(self) -> None:
        self._events.close()
        self._writers.close()

    def commit(self, commit: Commit, c: Array) -> None:
        """A commit was applied, and the center is now `c`."""
        self._loss.add(commit.loss, commit.steps)
        done = self._done.setdefault(commit.worker, [0, 0])
        done[0] += commit.steps
        done[1] += commit.commits
        leases = [lease._replace(first=self.before + lease.first) for lease in commit.leases]
        self._samples += sum(map(self._plan.count, leases))
        last = self._center.settled >= self.total or bool(self.stop_reason)
        self.evaluations.committed(c, self._point(), last)
        self.tick()

    def tick(self) -> None:
        """Begin and collect evaluations; log and display if due."""
        self.evaluations.tick()
        if self._log():
            rates = self._write_progress()
            self._write_workers()
            if not self._live and self._line():
                self.say(f"epoch {self._epochs()}  {self._status(rates)}  {self._time_left()}")

    def finish(self, c: Array) -> dict[str, Any]:
        """The training is over: evaluate the final center, and return the result."""
        seconds = time.monotonic() - self._start
        self._write_progress()
        self._write_workers(last=True)
        self.evaluations.finish(c, self._point())
        self.hide()
        self.evaluations.close()
        result = {
            "clock": self._center.clock,
            "commits": self._center.clock,
            "steps": self._center.steps,
            "samples": self._samples,
            "seconds": round(seconds, 3),
            "samples_per_second": round(self._samples / seconds, 1),
            "goodput": self._goodput(),
            "loss": self._loss.value,  # mean training loss over the last epoch's worth of steps
            "metrics": dict(self.metrics),
            **({"best": best.result()} if (best := self.evaluations.best) else {}),
            **({"stopped": self.evaluations.stop} if self.evaluations.stop else {}),
            "failed_evaluations": self.failed_evaluations,
            "staleness": {
                "mean": round(self._center.staleness_mean, 3),
                "max": self._center.staleness_max,
            },
            "steps_per_commit": round(self._steps_per_commit, 3),
            "dropped": self._center.dropped,  # commits of weight 0, such as too old
            "given_up": self._center.given_up,  # steps whose commits were refused repeatedly
        }
        result = dict(json_safe(result))
        self._events.write("end", result=result, **self._stamp())
        self._close()
        return result

    def _goodput(self) -> float | None:
        """Of the whole run, also before this rank became the center."""
        try:
            good = goodput(read_events(self._file))
        except OSError:  # it could not be written, as was said
            return None
        return good and round(good, 4)

    @property
    def _steps_per_commit(self) -> float:
        """The mean of all commits; λ, and more where workers do not wait."""
        return self._center.steps / max(self._center.clock, 1)

    def _point(self) -> Point:
        return Point(self._center.steps, self._center.clock, self._loss.value)

    def _evaluated(self, evaluation: Evaluation) -> None:
        (steps, clock, loss), self.metrics, error = evaluation
        if not self.metrics and not error:
            return
        at = {"step": steps, "epoch": self._epoch(steps), "clock": clock, "loss": loss}
        if error:
            self.failed_evaluations += 1
            self._events.write("evaluation_failed", **at, error=error, **self._stamp())
            self.say(f"WARNING: the evaluation at epoch {self._epoch(steps):.3g} failed:\n{error}")
            if not steps:
                self.failure = error
            return
        self._events.write("evaluation", **at, metrics=self.metrics, **self._stamp())
        self.say(f"evaluation at epoch {self._epoch(steps):.3g}: {format_metrics(self.metrics)}")

    def _epoch(self, steps: float) -> float:
        return round(steps / self._plan.steps_per_epoch, 4)

    def _epochs(self) -> str:
        return f"{self._epoch(self._center.steps):.2f}" + (
            f"/{self._epoch(self.total):.3g}" if self.total < inf else ""
        )

    def _rate(self) -> tuple[float, ...]:
        """Commits and samples per second, lately."""
        now = time.monotonic()
        self._pace.add(now, self._center.settled)
        return self._rates.add(now, (self._center.clock, self._samples))

    def _write_progress(self) -> tuple[float, ...]:
        rates = self._rate()
        self._events.write(
            "progress",
            step=self._center.steps,
            epoch=self._epoch(self._center.steps),
            loss=self._loss.value,
            commits=self._center.clock,
            staleness_mean=round(self._center.staleness_mean, 3),
            staleness_max=self._center.staleness_max,
            steps_per_commit=round(self._steps_per_commit, 3),
            commits_per_second=round(rates[0], 4),
            samples_per_second=round(rates[1], 3),
            **self._stamp(),
        )
        self._update_bar(rates)
        return rates

    def _update_bar(self, rates: tuple[float, ...]) -> None:
        self._progress.update(
            self._task,
            completed=self._center.steps,
            total=self._bar_total,
            epoch=self._epochs(),
            facts=self._status(rates),
            left=self._time_left(),
        )

    def _write_workers(self, last: bool = False) -> None:
        """Write what each worker, or node center, has done: each 5 s at first, then ever more rarely.

        Nothing where the center sees sums of all workers' steps, and cannot know whose they are.
        """
        if self._center.rule.allreduce or isinstance(self._center, SummedCenter):
            return
        elapsed = time.monotonic() - self._start
        if not last and elapsed - self._done_at < max(5.0, elapsed / 100):
            return
        self._done_at = elapsed
        done = [self._done.get(worker, [0, 0]) for worker in self.evaluations.role.numbers]
        self._events.write("workers", steps=[steps for steps, _ in done], commits=[commits for _, commits in done])

    def _time_left(self) -> str:
        if not self._center.steps:
            return "waiting for the first commit"
        now = time.monotonic()
        if self._center.settled < self.total and (silent := self._pace.since(now)):
            return f"no commit for {duration(silent)}"
        left = self._pace.left(now, self.total)
        return "" if left is None else f"{duration(left)} left"

    def _status(self, rates: tuple[float, ...]) -> str:
        facts = [f"loss {_short(self._loss.value)}", format_metrics(self.metrics)]
        facts += [
            f"{rates[0]:.3g} commits/s",
            f"{digits(rates[1])} samples/s",
            f"staleness {self._center.staleness_mean:.1f}",
        ]
        if not self._config.wait:
            facts.append(f"{self._steps_per_commit:.1f} steps/commit")
        return "  ".join(filter(None, facts))


def format_metrics(metrics: Mapping[str, float], between: str = "  ") -> str:
    """Metrics as text."""
    return between.join(f"{name} {_short(value)}" for name, value in metrics.items())


def _short(value: float) -> str:
    """A number, aligned from one time to the next where it is of everyday size."""
    return f"{value:.4f}" if 0.1 <= abs(value) < 100 or value == 0 else digits(value)
