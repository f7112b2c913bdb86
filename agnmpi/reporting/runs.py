"""Runs on disk, as they are shown: what was asked for, what happened, and how they ended."""

import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ..recovery.files import load_facts

Event = dict[str, Any]
_ENDS = {"end": "done", "interrupted": "interrupted", "failed": "failed", "complete": "done"}
_SILENT = 60.0  # seconds without an event after which a run that has not ended counts as crashed


class Run(NamedTuple):
    """A run.

    Args:
        path: its directory.
        options: as it was configured last.
        events: of events.jsonl, each with `wall`: seconds of training so far, over all times that it was resumed.
        result: of result.json; empty before the end, also where the run goes on after one.
        best: its best center so far: metric, value and step; empty where none is kept.
        state: done, interrupted, failed, crashed, running.
    """

    path: Path
    options: Mapping[str, Any]
    events: Sequence[Event]
    result: Mapping[str, Any]
    best: Mapping[str, Any]
    state: str

    def of(self, *kinds: str) -> list[Event]:
        """Its events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def curve(self, name: str, x: str) -> list[tuple[float, float]]:
        """The points (x, y) of a metric, or of a number of progress; `x`: wall, epoch or step."""
        points = []
        for event in self.of("evaluation", "progress"):
            value = event["metrics"].get(name) if event["event"] == "evaluation" else event.get(name)
            if value is not None and event.get(x) is not None:
                points.append((float(event[x]), float(value)))
        return points

    @property
    def metrics(self) -> list[str]:
        """The names of its metrics."""
        return list(dict.fromkeys(name for event in self.of("evaluation") for name in event["metrics"]))

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return float(self.events[-1]["wall"]) if self.events else 0.0


def is_run(path: Path) -> bool:
    """Whether a run has written to this directory."""
    return (path / "events.jsonl").is_file()


def find(paths: Sequence[Path]) -> Iterator[Path]:
    """The runs among `paths` and in them, in order of their names."""
    for path in paths:
        if is_run(path):
            yield path
        elif path.is_dir():
            yield from sorted(inner for inner in path.iterdir() if is_run(inner))


def read(path: Path) -> Run:
    """Read a run; what is not there, or was cut short by a crash, is left out.

    Raises ValueError if no run has written to this directory.
    """
    if not is_run(path):
        raise ValueError(f"{path} is no run: it has no events.jsonl")
    events = list(read_events(path / "events.jsonl"))
    last = events[-1]["event"] if events else ""
    silent = time.time() - (path / "events.jsonl").stat().st_mtime
    state = _ENDS.get(last) or ("running" if silent < _SILENT else "crashed")
    result = _result(path, events)
    return Run(path, _options(path), events, result, result.get("best", {}) if result else _best(path), state)


def read_events(path: Path) -> Iterator[Event]:
    """The events in a file, with `wall`; a line that was cut short is skipped."""
    before = wall = 0.0
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event.get("event") == "start":
                before = wall
            event["wall"] = wall = before + float(event.get("seconds", 0.0))
            yield event


def _result(path: Path, events: Sequence[Event]) -> dict[str, Any]:
    """Of result.json, where that is of this run as it is now: since it began last, it has ended."""
    for event in reversed(events):
        if event["event"] == "start":
            break
        if event["event"] in ("end", "complete"):
            return _json(path / "result.json") | dict(event.get("result", {}))  # a file that was not written is older
    return {}


def _best(path: Path) -> dict[str, Any]:
    try:
        facts = load_facts(path / "best.safetensors")
        return {"metric": facts["metric"], "value": float(facts["value"]), "step": int(facts["step"])}
    except (OSError, ValueError, KeyError):  # there is none, or it is another's
        return {}


def _options(path: Path) -> dict[str, Any]:
    later = [file for file in path.glob("config-*.toml") if file.stem[7:].isdigit()]
    file = max(later, key=lambda file: int(file.stem[7:]), default=path / "config.toml")
    try:
        return flat(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options with those in tables beside the others.

    >>> flat({"period": 3, "options": {"hidden": 64}})
    {'period': 3, 'options.hidden': 64}
    """
    result = dict[str, Any]()
    for name, value in options.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result


def differences(runs: Sequence[Run]) -> list[str]:
    """The options in which runs differ; also their number of workers."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]


def workers(run: Run) -> int:
    """Its number of workers, when it began last."""
    return int(next((event["workers"] for event in reversed(run.events) if event["event"] == "start"), 0))


def summary(run: Run) -> dict[str, str]:
    """What a line about a run says, by column."""
    line = {"run": str(run.path), "state": run.state, "workers": str(workers(run)), "time": duration(run.seconds)}
    progress = run.of("progress")
    if progress:
        line["epoch"] = f"{progress[-1]['epoch']:.3g}"
    last = run.of("evaluation")
    line["last"] = " ".join(f"{name} {digits(value)}" for name, value in last[-1]["metrics"].items()) if last else ""
    if best := run.best:
        line["best"] = f"{best['metric']} {digits(best['value'])}"
    return line


def table(runs: Sequence[Run]) -> list[str]:
    """A line for each run, and the options in which they differ."""
    differ = [name for name in differences(runs) if name != "problem" or len(runs) > 1]
    rows = [summary(run) | {name: str(run.options.get(name, "")) for name in differ} for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: name for name in columns}, *rows]
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in columns}
    return ["  ".join(row.get(name, "").ljust(widths[name]) for name in columns).rstrip() for row in rows]


def digits(value: float | None) -> str:
    """A number with three significant digits; four where the fourth tells good from better, near 1.

    >>> [digits(x) for x in (0.98765, 12345.6, 0.000123456, None)]
    ['0.9877', '12,346', '0.000123', '–']
    """
    if value is None or not isfinite(value):
        return "–"
    if 0.1 <= abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A duration in units that a person would take.

    >>> [duration(x) for x in (4.2, 75, 7500, 200000)]
    ['4.2 s', '1 min 15 s', '2 h 05 min', '2 d 7 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest} s"
