"""Who is alive and who serves: the one record of it on each rank."""

from collections.abc import Sequence


class Membership:
    """The ranks of a session, by their numbers when it began.

    Args:
        size: ranks of the communicator.
        centers: of these, the ranks that serve, in order of their blocks; the others work. Empty where all train.
        workers: the others, by number, where that is not their order.

    >>> members = Membership(4)
    >>> members.worker_lost(1), members.lost, members.alive
    (2, [2], [0, 1, 3])
    """

    def __init__(self, size: int, centers: Sequence[int] = (0,), workers: Sequence[int] = ()) -> None:
        self.centers, serve = len(centers), set(centers)
        self.ranks = list(range(size))  # by rank of the current communicator; includes the dead until it is shrunk
        others = workers or [rank for rank in self.ranks if rank not in serve]
        self.serving = [*centers, *others]  # the centers, then by worker
        self.lost: list[int] = []  # in order of detection
        self.hung: list[int] = []  # of these, alive but unresponsive

    @property
    def alive(self) -> list[int]:
        """Ranks that are not known to be lost."""
        return [rank for rank in self.ranks if rank not in self.lost]

    @property
    def count(self) -> int:
        """Number of workers n in the communicator of the center."""
        return len(self.serving) - self.centers

    def rank_of(self, worker: int) -> int:
        """The rank of a worker of the current center; those that have joined from outside follow the others."""
        place = worker + self.centers
        return self.serving[place] if place < len(self.serving) else place

    def workers(self) -> list[int]:
        """Ranks of the current center's workers, by worker."""
        return self.serving[self.centers :]

    def worker_lost(self, worker: int) -> int:
        """A worker has died; returns its rank."""
        rank = self.rank_of(worker)
        self._lose([rank])
        return rank

    def shrunk(self, ranks: Sequence[int]) -> list[int]:
        """`ranks` survive, in the order of a new communicator; returns those newly known to be lost."""
        before, self.ranks = self.ranks, list(ranks)
        return self._lose(sorted(set(before) - set(ranks)))

    def left_behind(self, ranks: Sequence[int]) -> None:
        """`ranks` continue without those that do not respond."""
        self.hung += self.shrunk(ranks)

    def elected(self, ranks: Sequence[int]) -> list[int]:
        """The first of the surviving `ranks` serves the others from now on; returns the newly lost."""
        newly_lost = self.shrunk(ranks)
        self.serving = self.ranks
        return newly_lost

    def _lose(self, ranks: Sequence[int]) -> list[int]:
        new = [rank for rank in ranks if rank not in self.lost]
        self.lost += new
        return new
