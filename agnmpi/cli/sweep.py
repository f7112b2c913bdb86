"""`sweep`: a run for each point of a grid, in groups of the ranks of one world."""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mpi4py import MPI

from ..cluster.placement import divide_hosts, fault_tolerant
from ..core.backoff import wait_until
from ..reporting.runs import duration, is_run, read, table
from ..training.config import Config, load, newest_config
from ..training.exits import INTERRUPTED, UNEVALUATED, UNWRITTEN, Degraded, Failed, Interrupted, Signals, Unwritten
from ..training.job import train
from ..training.monitor import format_metrics
from ..training.outputs import changed_options, new_directory
from ..transport.agreement import ConfigError, allgather, raise_on_all


class Point(NamedTuple):
    """A point of the grid: the name of its directory, and its configuration, whose defaults depend on the ranks."""

    name: str
    config: Config


class Sweep(NamedTuple):
    """A sweep, as all ranks see it.

    Args:
        points: of the grid.
        folder: where each has a directory.
        todo: the numbers of those without a result.
        groups: number of groups of ranks.
        claims: a directory in which a group takes a point by creating a file of its number.
    """

    points: Sequence[Point]
    folder: Path
    todo: Sequence[int]
    groups: int
    claims: Path

    def claim(self) -> int | None:
        """The number of a point that no group has taken yet; None: there is none."""
        for number in self.todo:
            with suppress(FileExistsError):
                (self.claims / str(number)).touch(exist_ok=False)
                return number
        return None

    @property
    def unfinished(self) -> bool:
        """Whether any point has no result."""
        return not all((self.path(number) / "result.json").is_file() for number in self.todo)

    @property
    def next(self) -> str:
        """What to do where it was interrupted."""
        return f"the same command with --run-dir {self.folder} goes on"

    def path(self, number: int) -> Path:
        """The directory of a point."""
        return self.folder / self.points[number].name


def grid(path: str | None, given: Mapping[str, Any], sets: Sequence[str], axes: Sequence[str]) -> list[Point]:
    """The points of a grid; arguments as of `load`, and `axes`: `KEY=VALUE,VALUE…` each.

    >>> [point.name for point in grid(None, {}, [], ["rate=0.1,0.2", "options.sizes=[8,8]"])]
    ['rate=0.1,options.sizes=[8,8]', 'rate=0.2,options.sizes=[8,8]']
    """
    chosen = list[list[str]]()
    for axis in axes:
        key, _, values = axis.partition("=")
        if not values or key in ("run_dir", "resume"):
            raise ValueError(f"--grid {axis!r}: give KEY=VALUE,VALUE…, where KEY is an option of train")
        chosen.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    if not chosen:
        raise ValueError("which points? Give --grid KEY=VALUE,VALUE…, such as --grid rate=1e-3,1e-2")
    points = dict[str, Config]()
    for settings in product(*chosen):
        name = ",".join(settings).replace("/", "_")
        if name in points:
            raise ValueError(f"the grid has {name} twice")
        try:
            points[name] = replace(load(path, given, [*sets, *settings]), run_dir=None, resume=None)
            points[name].complete()  # refuses what does not fit
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return [Point(*item) for item in points.items()]


def main(
    world: MPI.Intracomm, points: Sequence[Point], folder: str | None, size: int | None, signals: Signals, inject: bool
) -> int:
    """Train the points that have no result yet, and print a table; collective.

    Args:
        world: all ranks.
        points: of the grid, the same on all ranks.
        folder: of the sweep; None: a new one.
        size: ranks of a group, which trains one point after the other; None: all.
        signals: that ask the sweep to stop.
        inject: faults, for tests.

    Returns:
        The exit code: 0 if all points are done; 75 if it was asked to stop; 74 if a result could not be written; 1 if
        a point has failed; 77 if evaluations have.

    Raises:
        ConfigError: on all ranks, where the groups, or what is in `folder`, do not fit.
    """
    size = size or world.size
    if world.size % size:
        raise ConfigError(f"{world.size} ranks make no groups of {size}: give --ranks-per-run a divisor")
    began, number = time.monotonic(), world.rank // size
    prepared = raise_on_all(world, lambda: _prepare(points, folder) if world.rank == 0 else None)
    directory, todo, claims = json.loads(allgather(world, json.dumps(prepared))[0])
    sweep = Sweep(points, Path(directory), todo, world.size // size, Path(claims))
    if world.rank == 0:
        groups = "all ranks together" if sweep.groups == 1 else f"{sweep.groups} groups of {size} ranks"
        _say(f"sweep: {len(todo)} of {len(points)} points to train, by {groups}, in {directory}/")
    group = MPI.Intracomm(world.Split(number, world.rank))
    divide_hosts(world, group, number)
    codes = _train_points(group, sweep, signals, inject)
    group.Free()
    try:
        codes = {code for text in allgather(world, json.dumps(sorted(codes))) for code in json.loads(text)}
    except MPI.Exception:  # a rank of another group has died
        if not fault_tolerant():
            raise
        codes.add(1)
    if world.rank == 0:
        shutil.rmtree(claims, ignore_errors=True)
        _report(sweep, time.monotonic() - began, INTERRUPTED in codes)
    with suppress(MPI.Exception) if fault_tolerant() else nullcontext():
        wait_until(world.Ibarrier().Test)  # Open MPI kills the job when a first rank exits with an error
    return next((code for code in (INTERRUPTED, UNWRITTEN, 1, UNEVALUATED) if code in codes), 0)


def _prepare(points: Sequence[Point], folder: str | None) -> tuple[str, list[int], str]:
    """At rank 0: the folder, what is to do there, and where it is claimed.

    Raises ValueError if a point was trained with other options.
    """
    problem = points[0].config.problem.rpartition(":")[2].lower()
    path = Path(folder) if folder else new_directory(f"{problem}-sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    path.mkdir(parents=True, exist_ok=True)
    for name, config in points:
        begun = newest_config(path / name).is_file()
        changed = changed_options(path / name, config.complete()) if begun else {}
        for option in ("rate", "warmup"):  # their defaults depend on the number of workers
            if getattr(config, option) is None:
                changed.pop(option, None)
        if changed:
            text = ", ".join(f"{key} {before!r}, not {now!r}" for key, (before, now) in changed.items())
            raise ValueError(f"{path / name} was begun with {text}: give another --run-dir")
    todo = [number for number, point in enumerate(points) if not (path / point.name / "result.json").is_file()]
    return str(path.resolve()), todo, tempfile.mkdtemp(prefix=".claims-", dir=path.resolve())


def _train_points(group: MPI.Intracomm, sweep: Sweep, signals: Signals, inject: bool) -> set[int]:
    """Train one point after the other in this group; how they ended, as exit codes."""
    codes = set[int]()
    while INTERRUPTED not in codes:
        claimed = raise_on_all(group, sweep.claim if group.rank == 0 else lambda: None)
        number = json.loads(allgather(group, json.dumps(claimed))[0])
        if number is None:
            break
        stopped = any(allgather(group, signals.received or ""))  # on any rank, between two points
        codes.add(INTERRUPTED if stopped else _train_point(group, sweep, number, signals, inject))
    return codes


def _train_point(group: MPI.Intracomm, sweep: Sweep, number: int, signals: Signals, inject: bool) -> int:
    """Train a point; how it ended, as an exit code. A failure that leaves all ranks in order ends that point alone."""
    name, config = sweep.points[number]
    config = replace(config, run_dir=str(sweep.path(number)), resume=None if config.record else "auto")
    label, result, code = f"point {number + 1} of {len(sweep.points)}, {name}", None, 0
    if group.rank == 0:
        _say(f"{label}: begins")
    with _display(group, sweep, number):
        try:
            result = train(config, group, signals, inject)
        except ConfigError as error:
            code, ended = 1, f"is refused: {error}"
        except (Failed, Interrupted, Unwritten) as error:
            if error.abort:
                raise
            code, ended = {Failed: 1, Interrupted: INTERRUPTED, Unwritten: UNWRITTEN}[type(error)], f"ended: {error}"
        except Degraded as degraded:  # MPI can be used no more
            if sweep.unfinished and not degraded.abort:
                if group.rank == 0:
                    _say(f"{label}: a rank is lost, and the sweep ends; {sweep.next}")
                degraded.code = INTERRUPTED
            raise
    if result is not None:
        code = UNEVALUATED if result["failed_evaluations"] else 0
        ended = f"done in {duration(result['seconds'])}, {format_metrics(result['metrics'], ', ')}"
    if group.rank == 0:
        _say(f"{label}: {ended}")
    return code


@contextmanager
def _display(group: MPI.Intracomm, sweep: Sweep, number: int) -> Iterator[None]:
    """Where several groups train, the display of each goes to a file beside its run."""
    if group.rank or sweep.groups == 1:
        yield
        return
    sweep.path(number).mkdir(exist_ok=True)
    with (sweep.path(number) / "output.txt").open("a", buffering=1) as file, redirect_stdout(file):
        yield


def _say(line: str) -> None:
    """Print a line in one write: other groups print, too."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _report(sweep: Sweep, seconds: float, interrupted: bool) -> None:
    """Print a line for each point that was begun, how long all took, and what to do next."""
    paths = list(map(sweep.path, range(len(sweep.points))))
    for line in table([read(path)._replace(path=Path(path.name)) for path in paths if is_run(path)]):
        _say(line)
    trained = sum(float(read(paths[number]).result.get("seconds", 0)) for number in sweep.todo if is_run(paths[number]))
    _say(f"{len(sweep.todo)} points in {duration(seconds)}, of which {duration(trained / sweep.groups)} training")
    if interrupted:
        _say(f"interrupted: {sweep.next}")
    _say(f"a page about them: python -m agnmpi report {sweep.folder}")
