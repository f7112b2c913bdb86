"""What an observer of a session is told, on the ranks where it happens."""

from collections.abc import Sequence

from ..arrays.backend import Array
from .leases import Lease
from .messages import Commit, Reply


class Observer:
    """Told of what happens in a session; given once, and every method does nothing unless overridden.

    All are called on the thread that serves or trains: they must not block.
    """

    def committed(self, commit: Commit, c: Array) -> None:
        """A commit was applied, and made the center `c` (n,); on each rank that applies."""

    def served(self, commit: Commit, reply: Reply) -> None:
        """The center has answered a message, whatever it asks."""

    def waiting(self) -> None:
        """Between two messages, and at each wake-up of a center that waits for one."""

    def left(self) -> None:
        """All have left; who is there is about to be found out."""

    def lost(self, rank: int, held: Sequence[Lease]) -> None:
        """A worker has died: `rank` as it was at the beginning; what it `held` uncommitted goes to the others."""

    def given_up(self, lease: Lease) -> None:
        """The commits of these steps were refused again and again: nobody takes them any more."""

    def alone(self) -> None:
        """This rank was elected, has lost all of its workers, and trains on alone."""

    def missing(self, ranks: Sequence[int]) -> None:
        """When all had left, these ranks were found to be lost."""

    def new_center(self, source: str, gone: Sequence[int]) -> None:
        """The center was lost, and another rank serves; on every rank that is left.

        Args:
            source: where it has begun, in words; told to the new center alone.
            gone: ranks that were not known to be lost.
        """
