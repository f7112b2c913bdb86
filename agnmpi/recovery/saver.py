"""Checkpoints of a running job: copied between two commits, written by a thread, announced to the workers."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..arrays.backend import Array
from ..core.center import Center
from ..core.timer import Every
from ..core.worker import Worker
from .checkpoint import center_file, folder, folders, prune, seal, worker_file

Say = Callable[[str], None]


class CenterSaver:
    """Saves what a center holds. The service pauses for one copy of c and the slots; a thread writes them.

    `facts()`: what else belongs into a checkpoint (layout, configuration, progress); `every_seconds`, `every_commits`:
    0 for never; `keep`: number of checkpoints that stay; `say` is told what goes wrong, and training goes on.
    """

    def __init__(
        self,
        run: Path,
        center: Center,
        facts: Callable[[], Mapping[str, Any]],
        say: Say,
        every_seconds: float = 0.0,
        every_commits: int = 0,
        keep: int = 3,
        index: int = 0,
    ) -> None:
        self._run, self._center, self._facts, self._say, self._keep = run, center, facts, say, keep
        self._index = index
        self._due = Every(seconds=every_seconds) if every_seconds else None
        self._due_commits = Every(steps=every_commits) if every_commits else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._wanted = False  # due, but the last one was still being written
        self.begun = 0  # number of the newest that `tick` began
        self.pause = 0.0  # seconds for which the service has stood still, the longest
        self.last: Path | None = None  # newest checkpoint that is whole

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def take_in(self) -> None:
        """Report what has been written, without waiting."""
        if self._pending is not None and self._pending.done():
            self._settle()

    def tick(self, c: Array) -> None:
        """Save if it is time. Call it when a commit has been applied, before that is answered."""
        self.take_in()
        due = [self._due()] if self._due else []
        due += [self._due_commits(self._center.clock)] if self._due_commits else []
        self._wanted = self._wanted or any(due)
        if not self._wanted or self._pending is not None or self._center.steps <= self._center.checkpoint:
            return
        self.save(c)
        self.begun = self._center.checkpoint

    def save(self, c: Array, steps: int | None = None) -> None:
        """Copy everything now, and have it written; `steps`: the checkpoint's number, if not this center's steps."""
        if self._pending is not None:
            self._settle()
        self._wanted = False
        number = self._center.steps if steps is None else steps
        start = time.perf_counter()
        arrays, facts = self._center.save(c)
        self.pause = max(self.pause, time.perf_counter() - start)
        where = folder(self._run, number)
        self._pending = self._pool.submit(self._write, where, arrays, {**self._facts(), **facts})
        self._center.checkpoint = number

    def _write(self, where: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        where.mkdir(parents=True, exist_ok=True)
        seal(center_file(where, self._index), arrays, facts)
        self.last = where
        if self._index == 0:
            prune(self._run, self._keep, int(facts["centers"]))

    def _settle(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            kept = f"the last good one is {self.last.name}" if self.last else "there is none so far"
            self._say(f"WARNING: the checkpoint could not be written ({error}); {kept}; training goes on")

    def finish(self) -> None:
        """Wait until what was begun is written."""
        if self._pending is not None:
            self._settle()
        self._pool.shutdown()


def save_worker(run: Path, worker: Worker, steps: int, say: Say) -> None:
    """Write the local state of `worker` for the checkpoint after `steps` steps.

    Where the run's directory is not to be seen (no shared file system), a resumed run starts this worker's optimizer
    anew.
    """
    where = folder(run, steps)
    if not where.is_dir() and any(other > where for other in folders(run)):
        return  # too late: it has been removed for newer ones
    try:
        where.mkdir(parents=True, exist_ok=True)
        seal(worker_file(where, worker.index), *worker.save())
    except OSError as error:
        say(f"WARNING: the local state of worker {worker.index} could not be written ({error}); training goes on")
