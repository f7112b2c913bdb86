"""The events of a session that an observer sees, on the ranks where they happen."""

from collections.abc import Sequence

from ..arrays.backend import Array
from .leases import Lease
from .messages import Commit, Reply


class Observer:
    """Callbacks for the events of a session; every method does nothing unless overridden.

    All are called on the thread that serves or trains: they must not block.
    """

    def committed(self, commit: Commit, c: Array) -> None:
        """A commit was applied, and the center is now `c` (n,); on each rank that applies commits."""

    def served(self, commit: Commit, reply: Reply) -> None:
        """The center has replied to a message of any kind."""

    def waiting(self) -> None:
        """Between two messages, and at each wake-up of a center that waits for one."""

    def left(self) -> None:
        """All workers have left; a check of which ranks are alive follows."""

    def guest_lost(self, rank: int, held: Sequence[Lease]) -> None:
        """As `lost`, of a worker of another job, which has died or gone."""

    def lost(self, rank: int, held: Sequence[Lease]) -> None:
        """A worker has died: `rank` as at the beginning; its uncommitted leases `held` go to the others."""

    def joined(self, rank: int) -> None:
        """A spare, `rank` as at the beginning, has been called in the place of a lost rank."""

    def given_up(self, lease: Lease) -> None:
        """The commits of these steps were refused repeatedly: they are never granted again."""

    def failing(self, worker: int, refusals: int) -> None:
        """The last commits of this worker, `refusals` of them, were refused; at the center, at 5, 50, … of them."""

    def diverged(self, error: RuntimeError) -> None:
        """All commits fail, as `error` says. It is raised, or, where this returns, the workers are told to leave."""
        raise error

    def alone(self) -> None:
        """This rank was elected, has lost all of its workers, and trains on alone."""

    def missing(self, ranks: Sequence[int]) -> None:
        """After all workers had left, these ranks were found to be lost."""

    def left_behind(self, ranks: Sequence[int]) -> None:
        """After all workers had left, these ranks did not answer: the others go on without them."""

    def new_center(self, source: str, newly_lost: Sequence[int]) -> None:
        """The center was lost, and another rank serves; on every surviving rank.

        Args:
            source: where the new center's state comes from, as text; on the new center alone.
            newly_lost: ranks that were not known to be lost.
        """
