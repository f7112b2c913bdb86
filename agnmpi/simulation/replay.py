"""Replay of a recorded run, in one process, in the order of its record."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.backend import Array, to_host
from ..cluster.machine import blas_threads, limit_blas
from ..core.messages import STOP, Commit
from ..recovery.files import load
from ..reporting import record
from ..training.config import Config
from ..transport.local import LocalCenter, LocalHandle, LocalWorker
from .simulate import Stage
from .timing import results


class _Outbox(LocalWorker):
    """A worker's end whose messages wait until they are next in the record."""

    def __init__(self, center: LocalCenter, worker: int) -> None:
        super().__init__(center, worker)
        self._local = center
        self.messages: deque[LocalHandle] = deque()

    def exchange(self, commit: Commit, out: Array | None) -> LocalHandle:
        """Store the message."""
        handle = LocalHandle(self._local, commit, out)
        self.messages.append(handle)
        return handle


def replay(recorded: Path, config: Config) -> Callable[[], dict[str, Any]]:
    """Prepare a replay of the messages of the run in `recorded`, in their order; call the result to run it.

    `config`: the run's own. With the same dtype and BLAS threads the center gets the same bits, which is checked
    if the run ended. Raises ValueError if there is no record, RuntimeError where the run cannot be repeated.
    """
    facts, order = record.read(recorded)
    stage = Stage(replace(config, workers=facts["workers"]))
    threads, local = facts["blas_threads"], stage.locals[0]
    limit_blas(threads[0])
    lines = [f"replay of {recorded}"]
    if set(threads) != {blas_threads()}:
        lines.append(
            f"WARNING: the run's workers had {threads} BLAS threads, this process has {blas_threads()}: the "
            f"bits may differ; set OMP_NUM_THREADS={threads[0]}"
        )
    stage.centers[0].idle_workers_wait = facts["idle_workers_wait"]
    outboxes = [_Outbox(local, i) for i in range(stage.config.workers)]
    sessions = stage.sessions(outboxes.__getitem__)

    def drive() -> None:
        for line, expected in enumerate(order, 2):
            messages = outboxes[expected.worker].messages
            if expected.control == STOP:  # the run was asked to stop
                stage.centers[0].control = STOP
            if expected.kind == "stop":  # by a worker, on which a signal came; it moved nothing
                continue
            if config.dylu:  # the run's speeds are unknown: grant the recorded leases
                stage.leases.pace = lambda _worker, _steps, granted=expected.work_steps: max(1, granted)
            while not messages and next(sessions[expected.worker], None) is not None:
                pass
            handle = messages.popleft() if messages else None
            actual = None
            if handle is not None:
                local.put(handle)
                local.serve_one(local.apply)
                assert handle.reply is not None
                actual = record.Served.of(handle.commit, handle.reply)
            if actual != expected:
                raise RuntimeError(
                    f"{recorded / record.NAME}, line {line}: the run had {expected}, the replay has {actual}: the "
                    "problem, its data or agnmpi are no longer those of the run"
                )

    def extra_results() -> dict[str, Any]:
        original, same = recorded / "center.safetensors", None
        if original.is_file():
            arrays, _ = load(original)
            same = stage.layout.pack(arrays).tobytes() == to_host(stage.c).tobytes()
        staleness = results(0.0, np.array(stage.staleness), 0.0, 0.0, [], 0, stage.config.workers)["staleness"]
        return {"staleness": staleness, "replayed": str(recorded), "same_bits": same}

    return lambda: stage.play(drive, lines, extra_results)
