"""What every role of a rank in a session has; needs no MPI."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arrays.backend import Array, to_host
from ..core.center import Center
from ..core.ends import CenterEnd, WorkerEnd
from ..core.leases import Leases, SpeedProportional
from ..core.worker import Worker

if TYPE_CHECKING:
    from mpi4py import MPI

Arrays = Mapping[str, Array]
Facts = Mapping[str, Any]


class Role:
    """A rank's role in a session; those of `roles` are the kinds.

    Args:
        center: the center's state, where this rank applies commits; else an empty one.
        workers: those that this rank drives (several where all live in one process).
        count: number of workers n.
    """

    serves = False  # whether this rank serves and does not train
    stores = False  # whether a checkpoint has a part that is restored here

    def __init__(self, center: Center, workers: Sequence[Worker], count: int) -> None:
        self.center, self.workers, self.count = center, list(workers), count
        self.comms: Sequence[MPI.Comm] = ()  # of its own
        self._numbers: Sequence[int] = ()
        self.session = 0  # sessions begun; of the last one:
        self.total: int | None = None
        self.period = 1
        self._resumed: Facts | None = None

    @property
    def c(self) -> Array:
        """(n,) the center variable, where this rank holds it whole; else as last pulled."""
        return self.workers[0].o

    @property
    def at_work(self) -> int:
        """Workers that are alive and have not left, without spares that wait; where this rank does not know, all."""
        return self.count

    @property
    def numbers(self) -> Sequence[int]:
        """Whose commits a center here would see: the workers' numbers, and behind them those of node centers."""
        return self._numbers or range(self.count)

    @property
    def span(self) -> slice:
        """The part of the center variable that this rank holds, or all."""
        return slice(None)

    @property
    def caveat(self) -> str:
        """What a user should know of the transport here; empty if nothing, or if another rank knows it."""
        return ""

    def resume(self, arrays: Arrays, facts: Facts) -> None:
        """Continue, in the next session, from a checkpoint, whose facts are those of the first center; on every rank.

        Args:
            arrays: of this rank's `span`, where it holds any of the center variable.
            facts: as of `Center.save`.

        Raises:
            ValueError: if the checkpoint is of another center optimizer.
        """
        self._resumed = facts
        for worker in self.workers:
            worker.sequence = max(worker.sequence, *facts["applied"], 0)  # new commits differ from applied ones

    def reopen(self, done: int, given_up: int) -> None:
        """The next session is the one that was complete in the checkpoint, with more steps than the `done` ones."""
        assert self._resumed is not None
        leases = {"next": done, "free": [], "given_up": given_up}
        self._resumed, self.session = {**self._resumed, "between": False, "leases": leases}, self.session - 1

    def start_from(self, x: Array) -> None:
        """Let the next session start from rank 0's `x` (n,); collective over those that hold any of the center."""

    def begin(self, total: int | None, period: int) -> None:
        """Prepare the work of a session: `total` steps over all workers (None: no end), λ = `period`; collective."""
        resumed, self._resumed = self._resumed, None
        self.session, self.total, self.period = self.session + 1, total, period
        self.center.session = self.session
        leases = Leases(total, period, SpeedProportional(period, self.center.now) if self.center.now else None)
        if resumed:
            done = int(resumed["steps"]) - int(resumed.get("before", 0))  # before this session
            if not resumed.get("between"):  # two sessions
                leases.restore(resumed["leases"] or {"next": done, "free": []})
        self._prepare(total, period, leases)
        for worker in self.workers:
            worker.total, worker.session = total, self.session

    def _prepare(self, total: int | None, period: int, leases: Leases) -> None:
        for end in self.ends():
            end.begin(total, period, leases)

    def ends(self) -> list[WorkerEnd | CenterEnd]:
        """All ends of this rank, in order of the centers."""
        return [worker.end for worker in self.workers]

    def copy_center(self) -> Callable[[], Array | None]:
        """Begin to copy the center variable; call the result repeatedly until it returns the copy (n,)."""
        copy = to_host(self.c).copy()
        return lambda: copy

    def close(self) -> None:
        """Free what the ends hold; collective."""
        for end in self.ends():
            end.close()
        for comm in self.comms:
            comm.Free()
