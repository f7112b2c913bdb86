"""Which steps a worker takes: leases, granted by the center, or in equal rounds where all exchange together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias


class Lease(NamedTuple):
    """Steps [first, first + steps) granted to one worker."""

    first: int
    steps: int


NONE = Lease(-1, 0)  # no work is left
# λ_k for a worker that has done so many steps since it was asked last.
Pace: TypeAlias = Callable[[int, int], int]


def speed_proportional(period: int, now: Callable[[], float]) -> Pace:
    """DyLU: λ_k = max(1, round(λ v_k / max v)), v_k the steps per second of worker k, exchanges included.

    `period`: λ, of the fastest worker; `now() -> seconds`: the clock to measure with. Steps and seconds of the past
    count half as much with each commit. Equal speeds give λ to all. Source: dynamic local updates of Liu et al. 2024
    (arXiv:2401.09135), rounded to the nearest, and measured while it runs.

    >>> clock = iter([0, 0, 10, 20])
    >>> pace = speed_proportional(10, lambda: next(clock))
    >>> [pace(worker, steps) for worker, steps in ((0, 0), (1, 0), (0, 10), (1, 10))]
    [10, 10, 10, 5]
    """
    seen: dict[int, tuple[float, float, float]] = {}  # time of the last commit, steps, seconds, by worker
    speeds: dict[int, float] = {}

    def pace(worker: int, steps: int) -> int:
        time = now()
        last, done, seconds = seen.get(worker, (time, 0.0, 0.0))
        if steps:
            last, done, seconds = time, done / 2 + steps, seconds / 2 + time - last
        seen[worker] = last, done, seconds
        if seconds > 0:
            speeds[worker] = done / seconds
        own = speeds.get(worker)
        return period if own is None else max(1, round(period * own / max(speeds.values())))

    return pace


class Leases:
    """The center's book of work: which steps are free, leased, or committed.

    `total`: steps over all workers, None for no end; `period`: λ, the steps of a lease; `pace`: gives each worker
    a λ_k of its own.

    >>> book = Leases(total=5, period=2)
    >>> [book.grant(worker) for worker in (0, 1, 0, 1)]
    [Lease(first=0, steps=2), Lease(first=2, steps=2), Lease(first=4, steps=1), Lease(first=-1, steps=0)]
    """

    def __init__(self, total: int | None, period: int, pace: Pace | None = None) -> None:
        self.total, self.period, self.pace = total, period, pace
        self.total_said = -1 if total is None else total  # as it travels
        self.committed = 0
        self._next = 0
        self._free: list[Lease] = []  # given back
        self._held: dict[int, list[Lease]] = {}
        self._done: dict[int, int] = {}  # steps of a worker since its last grant

    def state(self) -> dict[str, Any]:
        """What a checkpoint double_buffer: what is committed; whatever is leased is free again for who resumes."""
        free = [*self._free, *(lease for held in self._held.values() for lease in held)]
        return {"next": self._next, "free": [list(lease) for lease in sorted(free)], "committed": self.committed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; leases longer than λ are cut."""
        self._next, self.committed = int(state["next"]), int(state["committed"])
        for first, steps in reversed(state["free"]):
            for at in reversed(range(first, first + steps, self.period)):
                self._free.append(Lease(at, min(self.period, first + steps - at)))

    def open(self) -> list[Lease]:
        """Steps before `next` that are not committed, free or held, in order and in as few pieces as can be."""
        return _merged([*self._free, *(lease for held in self._held.values() for lease in held)])

    def take_over(self, next_step: int, open_steps: Sequence[Lease], claims: Sequence[tuple[int, Lease]]) -> list[bool]:
        """Go on from the book of a lost center, and from what the workers hold by their own word.

        `next_step`, `open_steps`: as that center has told them last; `claims`: (worker, lease); a lease granted
        later lies beyond. Returns which claims hold: one does not whose steps are committed, or claimed before. What
        nobody claims is free.

        >>> book = Leases(total=None, period=2)
        >>> book.take_over(4, [Lease(0, 4)], [(0, Lease(2, 2)), (1, Lease(6, 2)), (2, Lease(6, 2))])
        [True, True, False]
        >>> [book.grant(0) for _ in range(3)]
        [Lease(first=0, steps=2), Lease(first=4, steps=2), Lease(first=8, steps=2)]
        """
        end = max([next_step, *(lease.first + lease.steps for _, lease in claims)])
        left = _merged([*open_steps, Lease(next_step, end - next_step)])
        hold = []
        for worker, lease in claims:
            last = lease.first + lease.steps
            around = next((i for i in left if i.first <= lease.first and last <= i.first + i.steps), None)
            hold.append(around is not None)
            if around is not None:
                before = Lease(around.first, lease.first - around.first)
                after = Lease(last, around.first + around.steps - last)
                left = [i for i in left if i != around] + [i for i in (before, after) if i.steps]
                self._held.setdefault(worker, []).append(lease)
        free = sorted(left)
        held = sum(lease.steps for leases in self._held.values() for lease in leases)
        committed = end - held - sum(lease.steps for lease in free)
        self.restore({"next": end, "free": free, "committed": committed})
        return hold

    @property
    def next(self) -> int:
        """First step that was never granted."""
        return self._next

    @property
    def free(self) -> list[Lease]:
        """Leases that were given back."""
        return list(self._free)

    def held_by(self, worker: int) -> list[Lease]:
        """Leases of `worker`."""
        return list(self._held.get(worker, []))

    def holds(self, worker: int, done: Lease) -> bool:
        """Whether `worker` holds a lease that begins with the steps `done`."""
        return any(lease.first == done.first and lease.steps >= done.steps for lease in self._held.get(worker, []))

    @property
    def held(self) -> bool:
        """Whether any worker holds a lease: what it does not commit will be free again."""
        return bool(self._held)

    def grant(self, worker: int) -> Lease:
        """Lease the next free steps to `worker`."""
        period = self.pace(worker, self._done.pop(worker, 0)) if self.pace else self.period
        if self._free:
            lease = self._free.pop()
            self._give_back(Lease(lease.first + period, lease.steps - period))
            lease = Lease(lease.first, min(period, lease.steps))
        else:
            left = period if self.total is None else max(0, self.total - self._next)
            lease = Lease(self._next, min(period, left))
            self._next += lease.steps
        if not lease.steps:
            return NONE
        self._held.setdefault(worker, []).append(lease)
        return lease

    def commit(self, worker: int, done: Lease) -> None:
        """Snapshot `done`, the first steps of a lease of `worker`; what is left of that lease becomes free."""
        held = self._held.get(worker, [])
        lease = next((lease for lease in held if lease.first == done.first), None)
        if lease is None or done.steps > lease.steps:
            raise ValueError(f"worker {worker} commits steps {done}, but holds {held}")
        held.remove(lease)
        if not held:
            del self._held[worker]
        self.committed += done.steps
        self._done[worker] = self._done.get(worker, 0) + done.steps
        self._give_back(Lease(done.first + done.steps, lease.steps - done.steps))

    def refuse(self, worker: int, done: Lease) -> None:
        """Take back the lease whose steps `done` were refused."""
        held = self._held.get(worker, [])
        for lease in [lease for lease in held if lease.first == done.first]:
            held.remove(lease)
            self._done[worker] = self._done.get(worker, 0) + done.steps
            self._give_back(lease)
        if not held:
            self._held.pop(worker, None)

    def release(self, worker: int) -> None:
        """Take back all that `worker` holds."""
        for lease in self._held.pop(worker, []):
            self._give_back(lease)

    def _give_back(self, lease: Lease) -> None:
        if lease.steps > 0:
            self._free.append(lease)


def _merged(leases: Sequence[Lease]) -> list[Lease]:
    """The same steps in order, adjacent leases as one."""
    merged: list[Lease] = []
    for lease in sorted(leases):
        if merged and merged[-1].first + merged[-1].steps == lease.first:
            merged[-1] = Lease(merged[-1].first, merged[-1].steps + lease.steps)
        elif lease.steps:
            merged.append(lease)
    return merged


def rounds(
    total: int | None, period: int, worker: int, workers: int, start: int = 0, free: Sequence[Lease] = ()
) -> Iterator[Lease]:
    """The leases of `worker` where all workers exchange together: equal rounds, the last shared out evenly.

    A round takes λ consecutive steps for each worker. Every worker sees the same number of rounds; in the last
    one its lease may be empty, and it takes part all the same. `start`: steps that were granted before, of which
    those of `free` were not taken: they come first.

    >>> [list(rounds(8, 3, worker, 2)) for worker in (0, 1)]
    [[Lease(first=0, steps=3), Lease(first=6, steps=1)], [Lease(first=3, steps=3), Lease(first=7, steps=1)]]
    """
    for i in range(0, len(free), workers):
        yield free[i + worker] if i + worker < len(free) else Lease(start, 0)
    while total is None or start < total:
        share = period * workers if total is None else min(period * workers, total - start)
        base, extra = divmod(share, workers)
        yield Lease(start + worker * base + min(worker, extra), base + (worker < extra))
        start += share
