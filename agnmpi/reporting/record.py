"""The order in which a center served its messages: recorded during a run, read to replay it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.messages import LEAVE, STOP_ALL, WORK, Commit, Reply
from ..version import __version__

NAME = "order.jsonl"


class Served(NamedTuple):
    """A message that was served, and its reply; the pull, if any, was of `clock`."""

    kind: str  # ask, commit, pull, leave, stop
    worker: int
    sequence: int
    first: int  # step, of a commit
    steps: int
    clock: int  # of the center, afterwards
    status: int
    control: int
    work_first: int  # the lease granted, -1 for none
    work_steps: int

    @classmethod
    def of(cls, commit: Commit, reply: Reply) -> "Served":
        """Make the record of a message and its reply."""
        names = {LEAVE: "leave", WORK: "ask", STOP_ALL: "stop"}
        requests = next((name for flag, name in names.items() if commit.requests & flag), "pull")
        kind = requests if commit.payload is None else "commit"
        done = (commit.sequence, commit.first_step, commit.steps) if kind == "commit" else (0, 0, 0)
        return cls(kind, commit.worker, *done, reply.clock, reply.status, reply.control, *reply.work)


class Recorder:
    """Appends each served message to RUN/order.jsonl, one list per line, flushed each time: it survives a crash.

    Args:
        directory: of the run.
        workers: n.
        blas_threads: of each worker.
        idle_workers_wait: as of the center.
    """

    def __init__(self, directory: Path, workers: int, blas_threads: Sequence[int], idle_workers_wait: bool) -> None:
        self._file = (directory / NAME).open("x", encoding="utf-8")
        self._write(
            {
                "agnmpi": __version__,
                "workers": workers,
                "blas_threads": list(blas_threads),
                "idle_workers_wait": idle_workers_wait,
                "fields": Served._fields,
            }
        )

    def __call__(self, commit: Commit, reply: Reply) -> None:
        """A message was served."""
        self._write(Served.of(commit, reply))

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(directory: Path) -> tuple[dict[str, Any], Iterator[Served]]:
    """Read a record: its facts, and the served messages in order; a line that a crash cut short is skipped.

    Raises ValueError if there is none, or if it is of another version.
    """
    path = directory / NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the run was not recorded; train it with --record")
    lines = _whole_lines(path)
    try:
        facts = json.loads(next(lines, ""))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has no whole first line: {error}") from error
    if tuple(facts.get("fields", ())) != Served._fields:
        raise ValueError(f"{path} was written by another version of agnmpi ({facts.get('agnmpi')}); replay it there")
    return facts, (Served(*json.loads(line)) for line in lines)


def _whole_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))
