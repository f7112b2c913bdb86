"""Who is alive, and who serves: the one record of it on each rank."""

from collections.abc import Sequence


class Membership:
    """The ranks of a session, by the numbers that they had when it began.

    Args:
        size: ranks of the communicator.
        centers: of these, the first serve and the others work; 0 where all train.

    >>> members = Membership(4)
    >>> members.worker_lost(1), members.lost, members.alive
    (2, [2], [0, 1, 3])
    """

    def __init__(self, size: int, centers: int = 1) -> None:
        self.centers = centers
        self.ranks = list(range(size))  # by rank of the communicator of now; the dead are in it until it is shrunk
        self.serving = self.ranks  # likewise, of the communicator that center and workers exchange by
        self.lost: list[int] = []  # in the order in which it was found out
        self.hung: list[int] = []  # of these, the ones that live, but do not answer

    @property
    def alive(self) -> list[int]:
        """Ranks that are not known to be lost."""
        return [rank for rank in self.ranks if rank not in self.lost]

    @property
    def count(self) -> int:
        """Number of workers n in the communicator by which they exchange."""
        return len(self.serving) - self.centers

    def rank_of(self, worker: int) -> int:
        """The rank of a worker of the center of now."""
        return self.serving[worker + self.centers]

    def workers(self) -> list[int]:
        """Ranks of the workers of the center of now, by worker."""
        return self.serving[self.centers :]

    def worker_lost(self, worker: int) -> int:
        """A worker has died; returns its rank."""
        rank = self.rank_of(worker)
        self._lose([rank])
        return rank

    def shrunk(self, ranks: Sequence[int]) -> list[int]:
        """These are left, in the order of a new communicator; returns those newly known to be lost."""
        before, self.ranks = self.ranks, list(ranks)
        return self._lose(sorted(set(before) - set(ranks)))

    def left_behind(self, ranks: Sequence[int]) -> None:
        """These go on without those that do not answer."""
        self.hung += self.shrunk(ranks)

    def elected(self, ranks: Sequence[int]) -> list[int]:
        """The first of `ranks`, which are left, serves the others from now on; returns the newly lost."""
        gone = self.shrunk(ranks)
        self.serving = self.ranks
        return gone

    def _lose(self, ranks: Sequence[int]) -> list[int]:
        new = [rank for rank in ranks if rank not in self.lost]
        self.lost += new
        return new
