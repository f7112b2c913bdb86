"""Where the numbers of a run go besides events.jsonl: CSV, TensorBoard, Weights & Biases, MLflow.

All but CSV need a package of theirs, imported when it is asked for.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .events import json_safe
from .runs import read_events

Event = Mapping[str, Any]
_PROGRESS = ("loss", "samples_per_second", "commits_per_second", "staleness_mean")


class Writer(Protocol):
    """Takes the events of a run, as in events.jsonl, in order."""

    def write(self, event: Event) -> None:
        """An event: a mapping with `event`, its kind, `time`, and what else it tells."""

    def close(self) -> None:
        """The run ends."""


def numbers(event: Event) -> Iterator[tuple[str, float]]:
    """The numbers of an event that make a curve, by name.

    >>> list(numbers({"event": "evaluation", "step": 8, "metrics": {"accuracy": 0.5}}))
    [('accuracy', 0.5)]
    """
    if event["event"] == "progress":
        yield from ((name, event[name]) for name in _PROGRESS if event.get(name) is not None)
    elif event["event"] == "evaluation":
        yield from ((name, value) for name, value in event["metrics"].items() if value is not None)


class CSV:
    """RUN/metrics.csv: a line for each number, with step, epoch, seconds, name and value.

    The seconds are those of training over all times that the run was resumed, as in its report.
    """

    def __init__(self, directory: Path) -> None:
        path, events = directory / "metrics.csv", directory / "events.jsonl"
        self._before = max((event["wall"] for event in read_events(events)), default=0.0) if events.exists() else 0.0
        begins = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        if begins:
            self._csv.writerow(["step", "epoch", "seconds", "name", "value"])

    def write(self, event: Event) -> None:
        """As `Writer`."""
        for name, value in numbers(event):
            seconds = round(self._before + event["seconds"], 3)
            self._csv.writerow([event["step"], event["epoch"], seconds, name, repr(float(value))])
        self._file.flush()

    def close(self) -> None:
        """As `Writer`."""
        self._file.close()


class TensorBoard:
    """RUN/tensorboard; needs tensorboardX."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, event: Event) -> None:
        """As `Writer`."""
        for name, value in numbers(event):
            self._writer.add_scalar(f"{event['event']}/{name}", value, event["step"], walltime=event["time"])
        self._writer.flush()

    def close(self) -> None:
        """As `Writer`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, as the environment variables of `wandb` say; needs wandb."""

    def __init__(self, directory: Path) -> None:
        import wandb

        self._run = wandb.init(dir=str(directory), name=directory.name)

    def write(self, event: Event) -> None:
        """As `Writer`."""
        if values := {f"{event['event']}/{name}": value for name, value in numbers(event)}:
            self._run.log(values | {"step": event["step"]})

    def close(self) -> None:
        """As `Writer`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; needs mlflow."""

    def __init__(self, directory: Path) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=directory.name)

    def write(self, event: Event) -> None:
        """As `Writer`."""
        if values := dict(numbers(event)):
            self._mlflow.log_metrics(values, step=event["step"])

    def close(self) -> None:
        """As `Writer`."""
        self._mlflow.end_run()


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "csv": CSV, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow,
}  # fmt: skip


class _Called:
    """A function that takes the events."""

    def __init__(self, function: Callable[[Event], object]) -> None:
        self._function = function

    def write(self, event: Event) -> None:
        """As `Writer`; it may change what it is given."""
        self._function(json_safe(event))

    def close(self) -> None:
        """As `Writer`."""


class Writers:
    """Several writers; one that fails is reported, and left out from then on.

    Args:
        directory: of the run.
        names: of `WRITERS`.
        on_event: a function that takes the events, too.
        say: prints a line.
    """

    def __init__(
        self,
        directory: Path,
        names: tuple[str, ...],
        on_event: Callable[[Event], object] | None,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._writers: dict[str, Writer] = {} if on_event is None else {"on_event": _Called(on_event)}
        for name in names:
            try:
                self._writers[name] = WRITERS[name](directory)
            except Exception as error:  # of a package that is not ours: training goes on
                self._failed(name, error)

    def write(self, event: Event) -> None:
        """As `Writer`."""
        self._each("write", event)

    def close(self) -> None:
        """As `Writer`."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for name, writer in list(self._writers.items()):
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:  # as above
                del self._writers[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._say(f"WARNING: {name} takes no events: {type(error).__name__}: {error}")
