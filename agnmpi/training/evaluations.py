"""Evaluations of the center: beside the training, one at a time; the best center is kept, and may end the run."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays.backend import Array, to_host
from ..cluster.role import Role
from ..core.backoff import Every
from ..core.params import Layout
from ..recovery.files import load_facts, save
from .config import Config
from .user_code import user_frames

Evaluate = Callable[[Array], Mapping[str, float]]
BEST = "best.safetensors"


class Point(NamedTuple):
    """A point of a run: its steps and commits so far, and the mean training loss."""

    steps: int
    clock: int
    loss: float


class Evaluation(NamedTuple):
    """What an evaluation has found at `point`; where it has failed, `error` says how, with the user's frames."""

    point: Point
    metrics: Mapping[str, float]
    error: str = ""


class Best:
    """Keeps the center with the best value of a metric, in best.safetensors, and says when to stop.

    Args:
        config: complete; its `monitor`, `patience` and `stop_at`.
        layout: of the parameters.
        directory: of the run; the best of an earlier part of the run is read from it.
    """

    def __init__(self, config: Config, layout: Layout, directory: Path) -> None:
        assert config.monitor is not None
        self.name, self.sign = config.monitored
        self._config, self._layout, self._path = config, layout, directory / BEST
        self.value, self.steps = float("nan"), 0
        self.since = 0  # evaluations since the best
        if self._path.is_file():
            facts = load_facts(self._path)
            if facts.get("metric") == self.name:
                self.value, self.steps = float(facts["value"]), int(facts["step"])

    def forget(self) -> None:
        """The run begins anew: what another left here was not its own."""
        self.value, self.steps = float("nan"), 0

    def seen(self, point: Point, metrics: Mapping[str, float], c: Array) -> str:
        """An evaluation of `c` (n,): keep it if it is the best. Returns why the run is to stop, "" if it is not.

        Raises ValueError if there is no such metric, OSError if it cannot be kept.
        """
        if self.name not in metrics:
            raise ValueError(f"--monitor {self.name}: evaluate returns {', '.join(metrics) or 'nothing'}")
        value, config = metrics[self.name], self._config
        self.since += 1
        if value == value and not self.sign * value <= self.sign * self.value:  # self.value is NaN at first
            self.value, self.steps, self.since = value, point.steps, 0
            facts = {"metric": self.name, "value": repr(value), "step": str(point.steps), "clock": str(point.clock)}
            save(self._path, self._layout.views(to_host(c)), facts)
        if config.stop_at is not None and self.sign * value >= self.sign * config.stop_at:
            return f"{self.name} is {value:.4g}: stop_at {config.stop_at:g}"
        if config.patience is not None and self.since >= config.patience:
            return f"{self.name} was not better in {self.since} evaluations than {self.value:.4g} at step {self.steps}"
        return ""

    def result(self) -> dict[str, Any]:
        """The best, for result.json."""
        return {"metric": self.name, "value": self.value, "step": self.steps}


class Evaluations:
    """Evaluates the center every so often: in a thread, on a copy; where the rank also trains, between two steps.

    Args:
        evaluate: returns the metrics of a center variable (n,); it may fail, and training goes on.
        every: steps between evaluations; 0: none but the first and the last.
        best: what to keep, if anything.
        done: called with each evaluation, on the thread that trains or serves.
    """

    def __init__(
        self, role: Role, evaluate: Evaluate, every: float, best: Best | None, done: Callable[[Evaluation], None]
    ) -> None:
        self.role, self._evaluate, self.best, self._done = role, evaluate, best, done
        self._due = Every(steps=every) if every else None
        self._wanted = False
        self._copying: Callable[[], Array | None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._pending: Future[Evaluation] | None = None
        self._at = Point(0, 0, float("nan"))
        self.stop = ""  # why the run is to stop

    def resumed(self, steps: int) -> None:
        """The run goes on after `steps`."""
        if self._due is not None:
            self._due(steps)

    def first(self, c: Array, point: Point) -> None:
        """Evaluate the initial `c` (n,), so that mistakes show at once."""
        if self.best is not None:
            self.best.forget()
        if not self.role.serves:
            self._done(self._measure(c, point))
            return
        self._pending = self._pool.submit(self._measure, to_host(c).copy(), point)

    def committed(self, c: Array, point: Point, last: bool) -> None:
        """A commit was applied, and the center is now `c`: evaluate it if due, and not `last`."""
        if self._due is not None and self._due(point.steps):
            self._wanted = True
        if not self._wanted or self._pending is not None or self._copying is not None or last:
            return
        self._wanted, self._at = False, point
        if self.role.serves:
            self._copying = self.role.copy_center()
        else:
            self._done(self._measure(c, point))

    def tick(self) -> None:
        """Go on with an evaluation, and report it if it is done."""
        if self._copying is not None and (copy := self._copying()) is not None:
            self._copying = None
            self._pending = self._pool.submit(self._measure, copy, self._at)
        if self._pending is not None and self._pending.done():
            self._collect()

    def finish(self, c: Array, point: Point) -> None:
        """Evaluate the final `c`, after what is under way."""
        self.wait()
        self._done(self._measure(c, point))

    def close(self) -> None:
        """End the thread, when its evaluation is done."""
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Wait for what is under way, if anything."""
        if self._pending is not None:
            self._collect()

    def settle(self) -> None:
        """As `wait`, and end."""
        self.wait()
        self.close()

    def _collect(self) -> None:
        assert self._pending is not None
        finished, self._pending = self._pending.result(), None
        self._done(finished)

    def _measure(self, c: Array, point: Point) -> Evaluation:
        metrics: Mapping[str, float] = {}
        try:
            metrics = self._evaluate(c.copy())  # the user's code may change it
            if self.best is not None:
                why = self.best.seen(point, metrics, c)
                self.stop = self.stop or why
        except Exception as error:  # the user's: reported, and the training goes on
            return Evaluation(point, metrics, user_frames(error))
        return Evaluation(point, metrics)


class AtCenter(Evaluations):
    """Calls `call(point, c)` with a copy of the center every so many steps; its errors are given to `failed`."""

    def __init__(
        self, role: Role, every: float, call: Callable[[Point, Array], object], failed: Callable[[str], None]
    ) -> None:
        super().__init__(role, lambda _: {}, every, None, lambda done: failed(done.error) if done.error else None)
        self._call = call
        self.resumed(role.center.steps)

    def _measure(self, c: Array, point: Point) -> Evaluation:
        try:
            self._call(point, c.copy())  # the user's code may change it
        except Exception as error:  # the user's: reported, and the training goes on
            return Evaluation(point, {}, user_frames(error))
        return Evaluation(point, {})
