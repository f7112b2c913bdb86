"""Work that no center grants: divided among all workers alike, or in equal rounds where all exchange together."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from .leases import NONE, Lease, Leases, fair


class Division(NamedTuple):
    """Work that is divided among all workers alike: first what is free, then what was never granted, λ at a time.

    Args:
        total: steps over all workers; None: no end.
        period: λ.
        start: steps that were granted before.
        free: of these, what was not done.
        given_up: of these, what is never granted again.

    >>> work = Division(8, 3, 4, [Lease(0, 4)])
    >>> [work.lease(k) for k in range(5)][1:]
    [Lease(first=3, steps=1), Lease(first=4, steps=3), Lease(first=7, steps=1), Lease(first=-1, steps=0)]
    >>> work.state(3, [Lease(5, 2)])
    {'next': 7, 'free': [[5, 2]], 'committed': 5, 'given_up': 0}
    >>> [work.fair(8, granted, 1) for granted in (1, 2)], work.lease(2, 2)
    ([1, 2], Lease(first=4, steps=4))
    """

    total: int | None
    period: int
    start: int
    free: Sequence[Lease]
    given_up: int = 0

    @classmethod
    def of(cls, leases: Leases) -> "Division":
        """What is left in `leases`, none of which is held."""
        return cls(leases.total, leases.period, leases.next, leases.free, leases.given_up)

    def _pieces(self, lease: Lease) -> int:
        return -(-lease.steps // self.period)

    def lease(self, k: int, periods: int = 1) -> Lease:
        """The k-th lease, from 0, with those behind it if it is for several `periods`; `NONE` behind the last."""
        for lease in self.free:
            if k < self._pieces(lease):
                at = lease.first + k * self.period
                return Lease(at, min(self.period, lease.end - at))
            k -= self._pieces(lease)
        first, steps = self.start + k * self.period, periods * self.period
        if self.total is None:
            return Lease(first, steps)
        return Lease(first, min(steps, self.total - first)) if first < self.total else NONE

    def fair(self, wanted: int, granted: int, workers: int) -> int:
        """As `fair`, after so many leases were granted: for how many periods the next is; 1 of what was free."""
        k = granted - sum(map(self._pieces, self.free))
        if k < 0:
            return 1
        left = None if self.total is None else self.total - self.start - k * self.period
        return fair(wanted, left, self.period, workers)

    def state(self, granted: int, undone: Iterable[Lease], workers: int = 1, given_up: int = 0) -> dict[str, Any]:
        """As `Leases.state`: after so many rounds of a lease for each of `workers`, of which `undone` is not done.

        `given_up`: steps of these rounds that are never granted again.
        """
        given_up += self.given_up
        rounds_of_free = -(-sum(map(self._pieces, self.free)) // workers)
        next_step = self.start + max(0, granted - rounds_of_free) * workers * self.period
        if self.total is not None:
            next_step = max(self.start, min(next_step, self.total))
        free, pieces = list(undone), granted * workers
        for lease in self.free:
            taken = min(pieces * self.period, lease.steps)
            pieces = max(0, pieces - self._pieces(lease))
            free += [Lease(lease.first + taken, lease.steps - taken)] if taken < lease.steps else []
        committed = next_step - sum(lease.steps for lease in free) - given_up
        return {
            "next": next_step,
            "free": [*map(list, sorted(free))],
            "committed": committed,
            "given_up": given_up,
        }


def rounds(
    total: int | None, period: int, worker: int, workers: int, start: int = 0, free: Sequence[Lease] = ()
) -> Iterator[Lease]:
    """The leases of `worker` where all workers exchange together: equal rounds, the last divided evenly.

    A round takes λ consecutive steps for each worker. Every worker sees the same number of rounds; in the last
    one its lease may be empty, and it takes part all the same. `start`: steps that were granted before, of which
    those in `free` were not done: they come first, in pieces of at most λ.

    >>> [list(rounds(8, 3, worker, 2)) for worker in (0, 1)]
    [[Lease(first=0, steps=3), Lease(first=6, steps=1)], [Lease(first=3, steps=3), Lease(first=7, steps=1)]]
    """
    pieces = (Lease(at, min(period, lease.end - at)) for lease in free for at in range(lease.first, lease.end, period))
    while first := list(islice(pieces, workers)):
        yield first[worker] if worker < len(first) else Lease(start, 0)
    while total is None or start < total:
        share = period * workers if total is None else min(period * workers, total - start)
        base, extra = divmod(share, workers)
        yield Lease(start + worker * base + min(worker, extra), base + (worker < extra))
        start += share
