"""Which steps a worker computes: leases, granted by the center."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from math import ceil
from typing import Any, NamedTuple, TypeAlias


class Lease(NamedTuple):
    """Steps [first, first + steps) granted to one worker."""

    first: int
    steps: int

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.first + self.steps


NONE = Lease(-1, 0)  # no work is left
MAX_PARTS = 8  # leases of which a worker's commit may have steps
# Periods of λ steps that a worker which does not wait holds, at first and at most. While an exchange is under way it
# takes those that it has not committed: so a commit has up to 7 λ steps, and 4 λ in the mean where every exchange takes
# longer. One that is never short of steps holds few, so that it keeps none from the others at the end.
FEWEST_PERIODS, PERIODS = 2, 8
# λ_k of a worker, given its steps since the last call.
Pace: TypeAlias = Callable[[int, int], int]


class SpeedProportional:
    """DyLU: λ_k = max(1, round(λ v_k / max v)), v_k the steps per second of worker k, exchanges included.

    Earlier steps and seconds count half as much with each commit. Equal speeds give λ to all.

    Args:
        period: λ of the fastest worker, in steps.
        now: the clock to measure with, in seconds.

    Source: dynamic local updates of Liu et al. 2024 (arXiv:2401.09135), rounded to the nearest, and measured during the
    run.

    >>> clock = iter([0, 0, 10, 20])
    >>> pace = SpeedProportional(10, lambda: next(clock))
    >>> [pace(worker, steps) for worker, steps in ((0, 0), (1, 0), (0, 10), (1, 10))]
    [10, 10, 10, 5]
    """

    def __init__(self, period: int, now: Callable[[], float]) -> None:
        self.period, self._now = period, now
        self._measured: dict[int, tuple[float, float, float]] = {}  # last commit at, steps, seconds, by worker
        self._speeds: dict[int, float] = {}

    def __call__(self, worker: int, steps: int) -> int:
        """λ_k of `worker`, which has done `steps` since the last call."""
        time = self._now()
        last, done, seconds = self._measured.get(worker, (time, 0.0, 0.0))
        if steps:
            last, done, seconds = time, done / 2 + steps, seconds / 2 + time - last
        self._measured[worker] = last, done, seconds
        if seconds > 0:
            self._speeds[worker] = done / seconds
        speed = self._speeds.get(worker)
        return self.period if speed is None else max(1, round(self.period * speed / max(self._speeds.values())))

    def forget(self, worker: int) -> None:
        """`worker` is lost: the others are no longer compared with its speed."""
        self._measured.pop(worker, None)
        self._speeds.pop(worker, None)


class Leases:
    """The center's record of the work: which steps are free, leased, committed, or given up.

    Steps whose commits were refused are granted again, if possible to another worker; when they have failed on two
    workers, or on one three times, they are given up.

    Args:
        total: steps over all workers, None for no end.
        period: λ, the steps of a lease.
        pace: λ_k of each worker; None: λ for all.

    >>> leases = Leases(total=5, period=2)
    >>> [leases.grant(worker) for worker in (0, 1, 0, 1)]
    [Lease(first=0, steps=2), Lease(first=2, steps=2), Lease(first=4, steps=1), Lease(first=-1, steps=0)]
    >>> leases.refuse(0, Lease(0, 2)), leases.grant(1), leases.refuse(1, Lease(0, 2)), leases.given_up
    (False, Lease(first=0, steps=2), True, 2)
    """

    def __init__(self, total: int | None, period: int, pace: Pace | None = None) -> None:
        self.total, self.period, self.pace = total, period, pace
        self.encoded_total = -1 if total is None else total  # as in a Commit
        self.given_up = 0  # steps that are neither committed nor granted again
        self._next = 0
        self._free = deque[Lease]()  # returned: granted from the right; refused ones go to the left
        self._held: dict[int, list[Lease]] = {}
        self._known = set[int]()  # workers that have asked for work, have left or are lost
        self._done: dict[int, int] = {}  # steps of a worker since its last grant
        self._refusals: dict[Lease, list[int]] = {}  # by steps: the workers whose commits were refused

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: what is committed and given up; whatever is leased is free after a resume."""
        free = [list(lease) for lease in sorted(self._open())]
        return {"next": self._next, "free": free, "committed": self.committed, "given_up": self.given_up}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; its leases may be longer than λ, and are cut when they are granted."""
        self._next, self.given_up = int(state["next"]), int(state.get("given_up", 0))
        self._free.extend(Lease(first, steps) for first, steps in reversed(state["free"]))

    def take_over(
        self,
        next_step: int,
        open_steps: Sequence[Lease],
        claims: Sequence[tuple[int, Lease]],
        given_up: int = 0,
    ) -> list[bool]:
        """Continue from the snapshot of a lost center and the leases that its workers report.

        Steps that nobody claims are free. Refusals are counted from 0.

        Args:
            next_step, open_steps, given_up: of that center's last snapshot.
            claims: (worker, lease); a lease granted later lies beyond `next_step`.

        Returns:
            For each claim whether it is valid: its steps are not committed, given up, or claimed before.

        >>> leases = Leases(total=None, period=2)
        >>> leases.take_over(4, [Lease(0, 4)], [(0, Lease(2, 2)), (1, Lease(6, 2)), (2, Lease(6, 2))])
        [True, True, False]
        >>> [leases.grant(0) for _ in range(3)]
        [Lease(first=0, steps=2), Lease(first=4, steps=2), Lease(first=8, steps=2)]
        """
        end = max([next_step, *(lease.end for _, lease in claims)])
        unclaimed = merged([*open_steps, Lease(next_step, end - next_step)])
        valid = []
        for worker, lease in claims:
            around = next((i for i in unclaimed if i.first <= lease.first and lease.end <= i.end), None)
            valid.append(around is not None)
            if around is not None:
                unclaimed = [piece for i in unclaimed for piece in (_without(i, lease) if i == around else [i])]
                self._held.setdefault(worker, []).append(lease)
        self.restore({"next": end, "free": sorted(unclaimed), "given_up": given_up})
        return valid

    @property
    def next(self) -> int:
        """First step that was never granted."""
        return self._next

    @property
    def free(self) -> list[Lease]:
        """Leases that were returned."""
        return list(self._free)

    @property
    def committed(self) -> int:
        """Number of steps that were committed."""
        return self._next - self.given_up - sum(lease.steps for lease in self._open())

    @property
    def left(self) -> int | None:
        """Steps that were never granted; None without end."""
        return None if self.total is None else self.total - self._next

    @property
    def held(self) -> bool:
        """Whether any worker holds a lease: what it does not commit will be free again."""
        return bool(self._held)

    def awaited(self, workers: AbstractSet[int]) -> set[int]:
        """Workers that hold leases, and those of `workers` that have not come yet: loading data may take them long."""
        return set(self._held) | (workers - self._known)

    def held_by(self, worker: int) -> list[Lease]:
        """Leases of `worker`."""
        return list(self._held.get(worker, []))

    def holds(self, worker: int, *parts: Lease) -> bool:
        """Whether `worker` holds leases that begin with these steps, each once: it may have got back what it lost."""
        leases = {self._held_from(worker, part.first): part.steps for part in parts}
        return len(leases) == len(parts) and all(lease and lease.steps >= steps for lease, steps in leases.items())

    def _held_from(self, worker: int, first: int) -> Lease | None:
        for lease in self._held.get(worker, ()):
            if lease.first == first:
                return lease
        return None

    def open(self) -> list[Lease]:
        """Steps before `next` that are free or held, in order and in as few pieces as can be."""
        return merged(self._open())

    def _open(self) -> list[Lease]:
        return [*self._free, *(lease for held in self._held.values() for lease in held)]

    def period_of(self, worker: int) -> int:
        """λ of this worker, where that depends on its speed at this time."""
        return self.pace(worker, self._done.pop(worker, 0)) if self.pace else self.period

    def grant(self, worker: int, skip_failed: bool = False, periods: int = 1) -> Lease:
        """Lease the next free steps to `worker`, as many as λ for each of `periods`, NONE if there are none.

        Steps at which this worker has failed before come last; `skip_failed`: leave them to others.
        """
        self._known.add(worker)
        period = max(1, periods) * self.period_of(worker)
        lease = self._pop_free(worker, failed=False) if self._free else None
        if lease is None:
            left = period if self.total is None else self.total - self._next
            lease = Lease(self._next, max(0, min(period, left)))
            self._next += lease.steps
        if not lease.steps and not skip_failed:
            lease = self._pop_free(worker, failed=True) or NONE
        if not lease.steps:
            return NONE
        if lease.steps > period:
            self._add_free(Lease(lease.first + period, lease.steps - period))
            lease = Lease(lease.first, period)
        self._held.setdefault(worker, []).append(lease)
        return lease

    def _pop_free(self, worker: int, failed: bool) -> Lease | None:
        """Remove and return a free lease at which `worker` has, or has not, failed before."""
        for i in reversed(range(len(self._free))):
            if (worker in self._failed_at(self._free[i])) == failed:
                lease = self._free[i]
                del self._free[i]
                return lease
        return None

    def carve(self, worker: int, part: Lease) -> None:
        """Make `part` of a lease of `worker` a lease of its own; the rest stays with that worker.

        Raises ValueError if the worker holds no such lease.
        """
        held = merged(self._held.get(worker, ()))
        around = next((lease for lease in held if lease.first <= part.first and part.end <= lease.end), None)
        if around is None:
            raise ValueError(f"worker {worker} commits steps {part}, but holds {held}")
        held.remove(around)
        self._held[worker] = [part, *_without(around, part), *held]

    def commit(self, worker: int, done: Lease) -> None:
        """Record `done`, the first steps of a lease of `worker`, as committed; the rest stays with that worker.

        Raises ValueError if the worker holds no such lease.
        """
        if not self.holds(worker, done):
            raise ValueError(f"worker {worker} commits steps {done}, but holds {self.held_by(worker)}")
        self._end(worker, done)
        self._forget_refusals(done)

    def release(self, worker: int, done: Lease) -> None:
        """Free those of the steps `done` that `worker` holds: their commit was dropped."""
        self._add_free(self._end_held(worker, done))

    def refuse(self, worker: int, done: Lease) -> bool:
        """Free the steps `done` of `worker`, which were refused; returns whether they are given up.

        They are if another worker has failed at them, too, or this one for the third time. `done` without steps: its
        whole lease was lost, but its steps did not fail.
        """
        lost = self._end_held(worker, done)
        failed = [*self._failed_at(done), worker]
        self._forget_refusals(done)
        if not done.steps or not lost.steps:
            self._free.extendleft([lost] if lost.steps else [])
            return False
        if len(failed) >= 3 or len(set(failed)) > 1:
            self.given_up += lost.steps
            return True
        self._refusals[lost] = failed
        self._free.appendleft(lost)
        return False

    def release_all(self, worker: int) -> None:
        """Free all leases of `worker`."""
        for lease in self._held.pop(worker, []):
            self._add_free(lease)

    def forget(self, worker: int) -> None:
        """`worker` has left, or is lost: free its leases, and forget its speed."""
        self._known.add(worker)
        self.release_all(worker)
        self._done.pop(worker, None)
        if isinstance(self.pace, SpeedProportional):
            self.pace.forget(worker)

    def _end_held(self, worker: int, done: Lease) -> Lease:
        """Take those of the steps `done` that `worker` holds from it, all its lease without steps; returns them."""
        lease = self._held_from(worker, done.first)
        if lease is None:
            return NONE
        ended = Lease(done.first, min(done.steps, lease.steps) or lease.steps)
        self._end(worker, ended)
        return ended

    def _end(self, worker: int, done: Lease) -> None:
        """Take `done`, the first steps of a lease, from `worker`."""
        held = self._held[worker]
        i = [lease.first for lease in held].index(done.first)
        held[i : i + 1] = _without(held[i], done)
        self._done[worker] = self._done.get(worker, 0) + done.steps
        if not held:
            del self._held[worker]

    def _add_free(self, lease: Lease) -> None:
        if lease.steps > 0:
            self._free.append(lease)

    def _failed_at(self, steps: Lease) -> list[int]:
        """The workers whose commits of any of `steps` were refused, once per refusal."""
        return [
            worker
            for refused, workers in self._refusals.items()
            if refused.first < steps.end and steps.first < refused.end
            for worker in workers
        ]

    def _forget_refusals(self, steps: Lease) -> None:
        if self._refusals:
            kept = ((piece, workers) for old, workers in self._refusals.items() for piece in _without(old, steps))
            self._refusals = dict(kept)


class Shares(Leases):
    """The work of a node center: what it is granted in bulk, it grants on to its workers, and reports what they did.

    Args:
        total: steps of the session, over all workers of the tree; None for no end.
        period: λ.

    >>> shares = Shares(total=8, period=2)
    >>> shares.add(Lease(0, 4))
    >>> shares.grant(3), shares.stock
    (Lease(first=0, steps=2), 1.0)
    """

    def __init__(self, total: int | None, period: int) -> None:
        super().__init__(0, period)
        self.encoded_total = -1 if total is None else total
        self.more = True  # the center above may grant more
        self.done: list[Lease] = []  # committed, and not reported yet
        self.refused: list[Lease] = []  # the same: the center above grants them again

    @property
    def stock(self) -> float:
        """How many periods are granted to no worker."""
        return sum(lease.steps for lease in self._free) / self.period

    @property
    def lent(self) -> bool:
        """Whether any worker holds a lease."""
        return bool(self._held)

    @property
    def held(self) -> bool:
        """Whether steps may come free: a worker that finds none waits for them."""
        return self.more or self.lent

    def add(self, lease: Lease) -> None:
        """These steps were granted from above; they come after those that are there."""
        if lease.steps:
            self._free.appendleft(lease)

    def commit(self, worker: int, done: Lease) -> None:
        """As `Leases.commit`."""
        super().commit(worker, done)
        self.done.append(done)

    def refuse(self, worker: int, done: Lease) -> bool:
        """Report these steps; without steps free their lease. Whether they are given up is decided above."""
        lost = self._end_held(worker, done)
        if done.steps and lost.steps:
            self.refused.append(lost)
        else:
            self._add_free(lost)
        return False


class Held:
    """The steps that a worker was granted and has not committed, in the order in which it takes them.

    Args:
        wait: whether a commit is of one lease, a period; else it has λ steps or more, of up to `MAX_PARTS` leases.

    >>> held = Held(wait=False)
    >>> held.add(Lease(0, 2), 2), held.add(Lease(8, 4), 2)
    (None, None)
    >>> held.done = 3
    >>> held.is_due, held.is_used_up, held.number, held.take(), held.numbers
    (True, False, 9, [Lease(first=0, steps=2), Lease(first=8, steps=1)], [9, 10, 11])
    """

    def __init__(self, wait: bool = True) -> None:
        self.wait = wait
        self.period = 1  # λ, as the center said last
        self.periods = FEWEST_PERIODS  # that it holds, if it does not wait
        self.leases = deque[Lease]()
        self.done = 0  # the first steps of these, since the last exchange was started

    @property
    def number(self) -> int:
        """Of the next step, over all workers."""
        done = self.done
        for lease in self.leases:
            if done < lease.steps:
                return lease.first + done
            done -= lease.steps
        raise IndexError("no step is held")

    @property
    def numbers(self) -> list[int]:
        """Of all steps to take, the next first."""
        return [lease.first + i for lease in self.leases for i in range(lease.steps)][self.done :]

    @property
    def _most(self) -> int:
        """Steps in a commit."""
        return sum(lease.steps for lease in islice(self.leases, 1 if self.wait else MAX_PARTS))

    @property
    def is_used_up(self) -> bool:
        """Whether no further step can be taken before a commit, also where there is none."""
        return self.done >= self._most

    @property
    def is_due(self) -> bool:
        """Whether a commit is due."""
        return bool(self.leases) and (self.is_used_up or (not self.wait and self.done >= self.period))

    def wanted(self, ahead: int) -> int:
        """How many periods to ask for; `ahead`: to be held beyond the one that is computed."""
        if self.wait:
            return 1
        return max(self.periods, ahead + 1) - ceil(sum(lease.steps for lease in self.leases) / self.period)

    def add(self, lease: Lease, period: int) -> None:
        """Hold `lease`, too; λ = `period` from now on. Where it comes too late, hold twice as many from now on."""
        if self.leases and self.is_used_up:
            self.periods = min(PERIODS, 2 * self.periods)
        self.leases.append(lease)
        self.period = period

    def take(self) -> list[Lease]:
        """Remove the steps that are done, parts of leases; where there is none, the first lease, which is empty."""
        taken = [self.leases.popleft()]
        while (left := self.done - sum(part.steps for part in taken)) > 0:
            taken.append(self.leases.popleft())
        if left < 0:
            first, steps = taken.pop()
            taken.append(Lease(first, steps + left))
            self.leases.appendleft(Lease(first + steps + left, -left))
        self.done = 0
        return taken

    def stop(self) -> None:
        """Hold no more than what is done."""
        done = self.done
        self.leases = deque(self.take() if done else ())
        self.done = done


def fair(wanted: int, left: int | None, period: int, workers: int) -> int:
    """How many periods of λ = `period` a worker gets that wants so many: at most its share of the steps that are left.

    Source: guided self-scheduling, Polychronopoulos and Kuck 1987.

    >>> [fair(8, left, 10, 4) for left in (None, 1000, 100, 10, 0)], fair(1, 1000, 10, 4)
    ([8, 8, 3, 1, 1], 1)
    """
    share = wanted if left is None else ceil(left / (workers * period))
    return max(1, min(wanted, share))


def _without(lease: Lease, steps: Lease) -> list[Lease]:
    """The rest of `lease` without `steps`, in order."""
    before = Lease(lease.first, min(lease.end, steps.first) - lease.first)
    last = max(lease.first, steps.end)
    after = Lease(last, lease.end - last)
    return [piece for piece in (before, after) if piece.steps > 0]


def merged(leases: Sequence[Lease]) -> list[Lease]:
    """The same steps in order, adjacent leases as one."""
    merged: list[Lease] = []
    for lease in sorted(leases):
        if merged and merged[-1].end == lease.first:
            merged[-1] = Lease(merged[-1].first, merged[-1].steps + lease.steps)
        elif lease.steps:
            merged.append(lease)
    return merged
