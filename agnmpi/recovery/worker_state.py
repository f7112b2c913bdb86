"""The state of a worker that a checkpoint holds: its parameters, the center as last pulled, its optimizer's slots."""

from collections.abc import Mapping
from typing import Any

from ..arrays.backend import Array, bring
from ..core.worker import Phase, Worker

CALLER = "caller/"  # begins the names of the caller's arrays in what is saved


def save_worker(worker: Worker) -> tuple[dict[str, Array], dict[str, Any]]:
    """What a checkpoint stores of `worker`, between two periods: x, o, the slots, all themselves, and metadata."""
    optimizer = worker.optimizer
    slots = optimizer.slots(worker.state) if optimizer else {}
    arrays = {"x": worker.x_at_leave, "o": worker.o} | {f"slot/{name}": slot for name, slot in slots.items()}
    arrays |= {CALLER + name: x for name, x in worker.more().items()}
    residual = worker.end.residual  # with overlap the exchange under way may replace it, but not change this one
    arrays |= {} if residual is None else {"residual": residual}
    return arrays, {
        "worker": worker.index,
        "clock": worker.clock,
        "optimizer": optimizer.name if optimizer else None,
        "optimizer_step": worker.state.step if optimizer else 0,
    }


def restore_worker(worker: Worker, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Restore what `save_worker` returned. Raises ValueError for another optimizer or another model."""
    optimizer = worker.optimizer
    name = optimizer.name if optimizer else None
    if facts["optimizer"] != name or arrays["x"].shape != worker.x.shape:
        raise ValueError(f"the worker's state is of optimizer {facts['optimizer']}, not {name}, or of another model")
    if optimizer:
        worker.state = optimizer.restore(worker.state, arrays, int(facts["optimizer_step"]))
    worker.x[...], worker.o[...] = bring(arrays["x"], worker.x), bring(arrays["o"], worker.x)
    if "residual" in arrays:
        worker.end.restore(bring(arrays["residual"], worker.x))
    worker.phase = Phase.RESUMED
