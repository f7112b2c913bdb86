"""Checkpoints of a loop of your own, with the command line's savers: on one rank, its center or its workers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.roles import HoldingRole, ShardRole
from ..core.params import Layout
from ..recovery.saver import CenterSaver, WorkerSaver, center_facts, consistent_cut
from ..training.session import Session


class OwnCheckpoints:
    """Writes what this rank has of a checkpoint.

    Args:
        directory: its folder `checkpoints` holds them.
        session: of this rank.
        layout: of the parameters.
        facts: further ones of the first center; called when a checkpoint is begun.
        say: called with each warning; training goes on.
        when: "all", "end" or "none": checkpoints that hold the workers' states.
        every: seconds between two checkpoints; 0: by `save` alone.
        keep: number of checkpoints to keep.
    """

    def __init__(
        self, directory: Path, session: Session, layout: Layout, facts: Callable[[], Mapping[str, Any]],
        say: Callable[[str], None], when: str, every: float = 0.0, keep: int = 3,
    ) -> None:  # fmt: skip
        role, first, centers = session.role, session.comm.rank == 0, max(1, session.members.centers)
        if centers > 1 and not session.single_commits:  # no consistent cut while the workers sum into all of them
            every = 0.0
        ranks = session.members.workers() if session.failover else []

        def all_facts() -> dict[str, Any]:
            return {**center_facts(role, layout, centers, ranks), **facts()}

        self._role, self._saver = role, None
        self._cut = None
        if isinstance(role, HoldingRole) and role.stores and (role.serves or first):
            index = role.centers.rank if isinstance(role, ShardRole) else 0
            self._saver = CenterSaver(directory, role.center, all_facts, say, every if first else 0.0, 0, keep, index)
            if isinstance(role, ShardRole) and every:
                name = "rank {}".format
                self._cut = consistent_cut(role, self._saver, say, lambda k: name(session.members.serving[k]))
        self._first = first
        self._workers = [
            WorkerSaver(
                directory, worker, role.count, when, say,
                MPI.COMM_SELF.Iprobe,  # a probe moves all on; where ranks may die, one among them fails
            )
            for worker in role.workers
        ]  # fmt: skip

    def committed(self, c: Array) -> None:
        """A commit was applied, and the center is now `c` (n,): save if due."""
        if self._saver is not None and self._first:
            self._saver.tick(c)

    def waiting(self) -> None:
        """Go on with what is under way."""
        if self._cut is not None:
            self._cut.tick()
        elif self._saver is not None:
            self._saver.writing()

    def stepped(self) -> None:
        """A worker of this rank has taken a step."""
        for saver in self._workers:
            saver.tick()

    def save(self, steps: int) -> None:
        """Between two sessions: write the checkpoint after `steps` steps, and end."""
        for worker in self._workers:
            worker.finish(steps)
        if self._saver is not None and isinstance(self._role, HoldingRole):
            self._saver.save(self._role.end.c, steps)
            self._saver.finish()

    def finish(self) -> None:
        """Wait for what is being written, and end."""
        for worker in self._workers:
            worker.finish(None)
        if self._saver is not None:
            self._saver.finish()
