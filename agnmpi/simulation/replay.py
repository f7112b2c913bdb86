"""A recorded run, served once more in one process in the order of its record."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.backend import Array, to_host
from ..cluster.placement import blas_threads, limit_blas
from ..core.messages import STOP, Commit
from ..recovery.files import load
from ..reporting import record
from ..training.config import Config
from ..transport.local import LocalCenter, LocalHandle, LocalWorker
from .simulate import Stage
from .timing import figures


class _Outbox(LocalWorker):
    """A worker's end whose messages lie there until the record says that it is their turn."""

    def __init__(self, center: LocalCenter, worker: int) -> None:
        super().__init__(center, worker)
        self._held = center
        self.messages: deque[LocalHandle] = deque()

    def exchange(self, commit: Commit, out: Array | None) -> LocalHandle:
        """Lay the message down."""
        handle = LocalHandle(self._held, commit, out)
        self.messages.append(handle)
        return handle


def replay(recorded: Path, config: Config) -> Callable[[], dict[str, Any]]:
    """Make ready to serve the messages of the run in `recorded` once more, in their order; the call does it.

    `config`: the run's own. With the same dtype and BLAS threads the center gets the same bits, which is checked
    if the run ended. Raises ValueError if there is no record, RuntimeError where the run cannot be repeated.
    """
    facts, order = record.read(recorded)
    stage = Stage(replace(config, workers=facts["workers"]))
    threads, local = facts["blas_threads"], stage.locals[0]
    limit_blas(threads[0])
    said = [f"replay of {recorded}"]
    if set(threads) != {blas_threads()}:
        said.append(
            f"WARNING: the run's workers had {threads} BLAS threads, this process has {blas_threads()}: the "
            f"bits may differ; set OMP_NUM_THREADS={threads[0]}"
        )
    stage.centers[0].idle_workers_wait = facts["idle_workers_wait"]
    outboxes = [_Outbox(local, i) for i in range(stage.config.workers)]
    sessions = stage.sessions(outboxes.__getitem__)

    def drive() -> None:
        for line, expected in enumerate(order, 2):
            messages = outboxes[expected.worker].messages
            if expected.control == STOP:  # somebody had asked the run to end
                stage.centers[0].control = STOP
            if config.dylu:  # speeds are of the run's clock, which has gone: grant what was granted
                stage.leases.pace = lambda _worker, _steps, granted=expected.work_steps: max(1, granted)
            while not messages and next(sessions[expected.worker], None) is not None:
                pass
            handle = messages.popleft() if messages else None
            found = None
            if handle is not None:
                local.put(handle)
                local.serve_one(local.apply)
                assert handle.reply is not None
                found = record.Served.of(handle.commit, handle.reply)
            if found != expected:
                raise RuntimeError(
                    f"{recorded / record.NAME}, line {line}: the run had {expected}, the replay has {found}: the "
                    "problem, its data or agnmpi are no longer those of the run"
                )

    def also() -> dict[str, Any]:
        theirs, same = recorded / "center.safetensors", None
        if theirs.is_file():
            arrays, _ = load(theirs)
            same = stage.layout.pack(arrays).tobytes() == to_host(stage.c).tobytes()
        stale = figures(0.0, np.array(stage.staleness), 0.0, 0.0, [], 0, stage.config.workers)["staleness"]
        return {"staleness": stale, "replayed": str(recorded), "same_bits": same}

    return lambda: stage.play(drive, said, also)
