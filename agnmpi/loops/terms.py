"""What a program, its AGNOptimizer and the loop of that give each other."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..arrays.backend import Array
from ..training.evaluations import Point


class Status(NamedTuple):
    """How far a run is.

    Args:
        step: local steps that all workers have committed.
        clock: commits applied; step/clock is the mean number of steps in one.
        loss: mean over recent commits; at a worker over its own recent steps.
        staleness: mean of all commits; known at rank 0, and where all ranks train.
        steps_per_second: of all workers in this loop.
        center: a copy of the center, by name.
    """

    step: int
    clock: int
    loss: float
    staleness: float
    steps_per_second: float
    center: dict[str, Array]


class Caller(NamedTuple):
    """What a loop calls in the program that it belongs to."""

    pack: Callable[[], None]  # before x is read: copy arrays of the caller's own into it
    pulled: Callable[[], None]  # x has become a pulled center, or the final one
    refused: Callable[[], None]  # then, if this worker's commit was refused
    state: Callable[[], Mapping[str, Array]]  # a worker's arrays that checkpoints hold, beside its own
    restore: Callable[[Mapping[str, Array]], object]  # called with the same, when resumed
    tensors: Mapping[str, str]  # what lies in x: a checkpoint of another is refused; empty: not known


class Kept(NamedTuple):
    """Where checkpoints are kept."""

    directory: Path
    every: float  # seconds between two
    workers: str  # which hold the workers' states: "all", "end", "none", or "auto"

    @classmethod
    def of(cls, directory: str | Path | None, every: float, workers: str) -> "Kept | None":
        """None without a directory; raises ValueError for bad values."""
        if workers not in ("all", "end", "none", "auto"):
            raise ValueError(f"checkpoint_workers must be auto, all, end or none, not {workers!r}")
        if not every >= 0:
            raise ValueError(f"checkpoint_every must be a number of seconds of at least 0, not {every!r}")
        return None if directory is None else cls(Path(directory), every, workers)

    def make(self) -> None:
        """Make the directory; raises OSError where nothing can be written there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK):
            raise PermissionError(f"checkpoint: {self.directory} cannot be written to")


class Asked(NamedTuple):
    """A session that the caller asks for."""

    total: int | None  # steps over all workers
    at_center: Callable[[Point, Array], object] | None  # called where the center is
    every: float  # steps between two calls
    ahead: int = 0  # leases that a worker holds beyond the one that it computes
