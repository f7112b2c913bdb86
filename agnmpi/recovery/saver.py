"""Checkpoints of a running job: copied between two commits, written by a thread, announced to the workers."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..arrays.backend import Array, host_copy, synchronize
from ..arrays.kernels import all_finite
from ..cluster.role import Role
from ..cluster.roles import ShardRole
from ..core.backoff import Every, wait_until
from ..core.center import Center
from ..core.optimizers import Optimizer
from ..core.params import Layout
from ..core.worker import Worker
from ..version import __version__
from .checkpoint import caller_file, center_file, folder, folders, prune, seal, worker_file
from .cut import ConsistentCut, MPIMail
from .worker_state import CALLER, save_worker

Say = Callable[[str], None]
Files: TypeAlias = tuple[Mapping[str, Array], Mapping[str, Any]]  # arrays and facts

# Bytes of all workers' states up to which "auto" writes them with each checkpoint, and of one worker's up to which it
# is copied for a thread, so that training continues.
SMALL = 256 << 20


class _Outage:
    """Says once that something cannot be written, and once that it can be again."""

    def __init__(self, what: str, say: Say) -> None:
        self._what, self._say, self._reason = what, say, ""

    def begins(self, error: Exception, also: str = "") -> None:
        """It could not be written."""
        reason = str(error) or type(error).__name__  # a MemoryError may have no message
        if type(error).__name__ != self._reason:
            self._say(f"WARNING: {self._what} could not be written ({reason}){also}; training goes on")
        self._reason = type(error).__name__

    def ends(self) -> None:
        """It was written."""
        if self._reason:
            self._say(f"{self._what} is written again")
        self._reason = ""


class _Writer:
    """Writes files in a thread, one after the other.

    `failed` is called with the error of a write that has failed, `succeeded` after any other.
    """

    def __init__(
        self, name: str, failed: Callable[[Exception], None], succeeded: Callable[[], None] = lambda: None
    ) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._failed, self._succeeded = failed, succeeded
        self._pending: Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread; waits for the last one. Here, where the interpreter is ending."""
        self.wait()
        try:
            self._pending = self._pool.submit(write)
        except RuntimeError:  # no more threads
            self._pending = _called(write)

    def busy(self) -> bool:
        """Collect a finished write, without waiting; whether one is still under way."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return self._pending is not None

    def wait(self) -> None:
        """Wait until nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, MemoryError) as error:
            self._failed(error)
        else:
            self._succeeded()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._pool.shutdown()


def _called(write: Callable[[], None]) -> Future[None]:
    future = Future[None]()
    try:
        write()
    except Exception as error:  # raised again where the result is collected
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


class CenterSaver:
    """Saves a center. Serving pauses for one copy of c and the slots; a thread writes them.

    Args:
        run: directory of the run.
        center: its counts and slots.
        facts: further metadata of a checkpoint (layout, configuration, progress); called when one is begun.
        say: called with each warning; training goes on.
        every_seconds: between two checkpoints; 0: not by time.
        every_commits: the same by commits.
        keep: number of checkpoints to keep.
        index: of this center.
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
        self._run, self._center, self._facts, self._keep = run, center, facts, keep
        self._index = index
        self._due = Every(seconds=every_seconds) if every_seconds else None
        self._due_commits = Every(steps=every_commits) if every_commits else None
        self._outage = _Outage("the checkpoint", say)
        self._writer = _Writer("checkpoint", self._failed, self._outage.ends)
        self._wanted = False  # due, but the last one was still being written
        self.cut: ConsistentCut | None = None  # at the first of several centers: makes all of them save
        self.pause = 0.0  # longest pause of serving, in seconds
        self.last: Path | None = None  # newest checkpoint with a complete file of this center

    def writing(self) -> bool:
        """Collect a finished write, without waiting; whether one is still under way."""
        return self._writer.busy()

    def tick(self, c: Array) -> None:
        """Save if one is due. Call it when a commit has been applied, before the reply to it."""
        due = [self._due()] if self._due else []
        due += [self._due_commits(self._center.clock)] if self._due_commits else []
        self._wanted = self._wanted or any(due)
        if self.writing() or not self._wanted or self._center.steps <= self._center.checkpoint:
            return
        if self.cut is None:
            self.save(c)
        elif not self.cut.busy:
            # Announced now, so that this worker saves its current state. The number does not change with the cut.
            self._wanted, self._center.checkpoint = False, self._center.steps
            self.cut.begin(self._center.steps)

    def save(self, c: Array, steps: int | None = None) -> None:
        """Copy everything now, and start to write it; `steps`: the checkpoint's number, if not this center's steps."""
        self._writer.wait()
        self._wanted = False
        number = self._center.steps if steps is None else steps
        start = time.perf_counter()
        try:
            arrays, facts = self._center.save(c)
        except (MemoryError, OSError) as error:
            self._failed(error)
            return
        self.pause = max(self.pause, time.perf_counter() - start)
        directory = folder(self._run, number)
        self._writer.begin(partial(self._write, directory, arrays, {**self._facts(), **facts}))
        self._center.checkpoint = number

    def _write(self, directory: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        if spoilt := [name for name, x in arrays.items() if not all_finite(x)]:
            raise RuntimeError(
                f"{spoilt[0]!r} holds NaN or infinity at step {facts['steps']}: the run has diverged; "
                f"{self._last_good()}; lower the rate"
            )
        directory.mkdir(parents=True, exist_ok=True)
        seal(center_file(directory, self._index), arrays, facts)
        self.last = directory
        if self._index == 0:
            prune(self._run, self._keep, int(facts["centers"]))

    def _last_good(self) -> str:
        there = (path for path in folders(self._run) if center_file(path, self._index).is_file())  # of earlier savers
        last = self.last or next(there, None)
        return f"the last good checkpoint is {last.name}" if last else "there is no checkpoint so far"

    def _failed(self, error: Exception) -> None:
        self._outage.begins(error, f"; {self._last_good()}")

    def finish(self) -> None:
        """Wait until the last checkpoint is written."""
        self._writer.close()


def center_facts(role: Role, layout: Layout, centers: int, ranks: Sequence[int]) -> dict[str, Any]:
    """A checkpoint's facts beside those of the center itself.

    Args:
        role: of this rank.
        layout: of the parameters.
        centers: how many hold a block each.
        ranks: of the workers, where one may take over.
    """
    return {
        "agnmpi": __version__,
        "centers": centers,
        "workers": role.count,
        "layout": layout._asdict(),
        "ranks": list(ranks),
    }


def consistent_cut(role: ShardRole, saver: CenterSaver, say: Say, name: Callable[[int], str]) -> ConsistentCut:
    """Let `saver` save the block of `role` together with the other centers; `name`: describes a center."""
    cut = ConsistentCut(
        MPIMail(role.centers),
        role.end,
        role.center,
        lambda number: saver.save(role.end.c, number),
        saver.writing,
        say,
        name=name,
    )
    if role.centers.rank == 0:
        saver.cut, role.before_leaving = cut, cut.finish
    return cut


def state_bytes(model: int, optimizer: Optimizer | None) -> int:
    """Bytes of a worker's local state: x, what it last pulled, and the slots.

    Args:
        model: bytes of x.
        optimizer: the local one; None: none.
    """
    slots = len(optimizer.slots(optimizer.init(np.zeros(1)))) if optimizer else 0
    return (2 + slots) * model


def workers_saved(option: str, nbytes: int, workers: int) -> tuple[str, str]:
    """Choose when the workers' local states are written.

    Args:
        option: "all": with each checkpoint; "end": only where the run ends or is interrupted; "none": never;
            "auto": "all" up to 256 MB of all workers together, else "end".
        nbytes: of one worker's state.
        workers: n.

    Returns:
        "all", "end" or "none", and a message about the choice, empty where there was none.
    """
    if option != "auto":
        return option, ""
    total = nbytes * workers
    if total <= SMALL:
        return "all", ""
    return "end", (
        f"the workers' local states ({_size(total)}) are written at the end alone: after a crash their optimizers "
        "start anew; checkpoint_workers = all writes them with each checkpoint"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


class WorkerSaver:
    """Writes a worker's local state when the center has written a checkpoint.

    A small state is copied to the host, and training goes on while a thread writes it. A large one is written in
    place, from a device chunk by chunk: the worker waits, and no memory is needed. The workers do not all write at
    once: each is delayed by its part of a tenth of the time between two checkpoints, worker 0 not at all. That of the
    only worker is of the commit that the checkpoint is of: a run that goes on from both has the bits of an undisturbed
    one.

    Args:
        run: directory of the run. Without a shared file system a resumed run restarts this worker's optimizer.
        worker: whose state.
        workers: n.
        when: "all", "end" or "none", as chosen by `workers_saved`.
        say: called with each warning; training goes on.
        progress: called while the worker waits, so that others' messages make progress (`comm.Iprobe`).
        small: bytes up to which a state is copied.
    """

    def __init__(
        self,
        run: Path,
        worker: Worker,
        workers: int,
        when: str,
        say: Say,
        progress: Callable[[], object] = bool,
        small: int = SMALL,
    ) -> None:
        self._run, self.worker, self._when, self._progress = run, worker, when, progress
        self._part = worker.index / max(workers, 1) / 10
        self._small, self._alone = small, workers == 1
        self._seen = worker.checkpoint
        self._wanted: int | None = None  # number of the checkpoint to write for
        self._announced = time.monotonic()
        self._due = 0.0
        self._outage = _Outage(f"the local state of worker {worker.index}", say)
        self._writer = _Writer("worker-state", self._outage.begins, self._outage.ends)

    def tick(self) -> None:
        """Save if there is a new checkpoint. Call it after each step of the worker."""
        worker, now = self.worker, time.monotonic()
        if self._when != "all":
            return
        if worker.checkpoint != self._seen:
            self._seen = self._wanted = worker.checkpoint
            self._due, self._announced = now + self._part * (now - self._announced), now
        if self._wanted is None or worker.held.done or now < self._due:
            return
        if self._writer.busy():
            if self._alone:  # its state now is that of the checkpoint, and later is not: this one goes without
                self._wanted = None
            return
        number, self._wanted = self._wanted, None
        self._begin(number)

    def _begin(self, number: int) -> None:
        worker = self.worker
        try:
            arrays, facts = save_worker(worker)
            if sum(x.nbytes for x in arrays.values()) <= self._small:
                arrays = {name: host_copy(x) for name, x in arrays.items()}
        except MemoryError as error:
            self._outage.begins(error)
            return
        synchronize(worker.x)  # before another thread reads it
        self._writer.begin(partial(write_worker, self._run, worker.index, number, (arrays, facts)))
        if arrays["o"] is worker.o:
            wait_until(self._written)

    def _written(self) -> bool:
        self._progress()
        return not self._writer.busy()

    def finish(self, steps: int | None) -> None:
        """At the end: wait for what is being written, and save for the checkpoint after `steps` steps (None: none)."""
        self._writer.close()
        if steps is None or self._when == "none" or self.worker.spare:
            return
        try:
            write_worker(self._run, self.worker.index, steps, save_worker(self.worker))
        except (OSError, MemoryError) as error:
            self._outage.begins(error)
        else:
            self._outage.ends()


def write_worker(run: Path, index: int, steps: int, files: Files) -> None:
    """Write the local state of worker `index` for the checkpoint after `steps` steps, unless that was removed."""
    directory = folder(run, steps)
    if not directory.is_dir() and any(other > directory for other in folders(run)):
        return  # too late: pruned for newer ones
    directory.mkdir(parents=True, exist_ok=True)
    arrays, facts = files
    callers = {name: x for name, x in arrays.items() if name.startswith(CALLER)}
    if callers:
        seal(caller_file(directory, index), {name.removeprefix(CALLER): x for name, x in callers.items()}, {})
    seal(worker_file(directory, index), {name: x for name, x in arrays.items() if name not in callers}, facts)
