"""The center's state, and the loop of a center rank."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ..arrays.backend import Array, bring, host_copy
from .backoff import Backoff
from .ends import Apply, CenterEnd
from .leases import NONE, Lease, Leases, fair
from .messages import (
    CONTINUE,
    DROPPED,
    DUPLICATE,
    IDLE,
    LEAVE,
    MISFIT,
    NOT_FINITE,
    OK,
    PULL,
    REFUSED,
    STOP,
    STOP_ALL,
    WAIT,
    WORK,
    Commit,
    Reply,
    Snapshot,
)
from .observer import Observer
from .optimizers import Optimizer
from .rules import CommitInfo, Rule, center_step

PATIENCE = 10  # refused commits in a row after which nobody hopes any more
_NAMED = (5, 50, 500, 5000)  # refusals of a worker in a row at which it is named


class Center:
    """The center's state beside the center variable itself, which its end holds.

    Args:
        rule: how commits are weighed.
        like: the center variable (n,), or a vector like it.
        workers: their number n.
        optimizer: the center optimizer, None to add.
        patience: periods in a row whose commits were refused, after which the run ends, unless others are at work.
        observer: of commits, replies, and work that is given up.

    >>> import numpy as np
    >>> from agnmpi.core import rules
    >>> c = np.zeros(2)
    >>> center = Center(rules.agn(), c, workers=1)
    >>> center.leases = Leases(total=8, period=4)
    >>> center.apply(Commit(0, requests=WORK, total=8), c).work
    Lease(first=0, steps=4)
    >>> center.apply(Commit(0, 1, steps=4, requests=WORK, payload=np.ones(2)), c).clock, c
    (1, array([1., 1.]))
    """

    def __init__(
        self, rule: Rule, like: Array, workers: int, optimizer: Optimizer | None = None, patience: int = PATIENCE,
        observer: Observer = Observer(),  # noqa: B008
    ) -> None:  # fmt: skip
        self.rule, self.workers, self.optimizer = rule, workers, optimizer
        self.patience, self.observer, self.clock = patience, observer, 0
        self.counted = set(range(workers))  # who trains: spares that wait and who only reads have other numbers
        self.state: Any = optimizer.init(like) if optimizer else None
        self.applied = [0] * workers  # last sequence, by worker
        # The same, refused and dropped commits included: defines a consistent cut over shards.
        self.processed = dict[int, int]()
        self.on_block: Callable[[int], None] | None = None  # called after each block of a step, with its end
        self.leases: Leases | None = None  # None: the work is divided elsewhere
        self.division: Callable[[], Mapping[str, Any]] | None = None  # then: its state, where that is known
        self.now: Callable[[], float] | None = None  # clock for the workers' speeds, where λ_k depends on them
        self.idle_workers_wait = False  # a request that finds no work is answered later
        self.waiting = set[int]()  # workers whose request for work is not answered yet
        self.staleness_sum = self.staleness_max = 0
        self.steps = 0  # local steps in all applied commits
        self.given_up = 0  # steps that are never granted again
        self.refused = 0  # commits
        self.dropped = 0  # commits that weighed nothing
        self.nodes: AbstractSet[int] = frozenset()  # workers that are node centers: they commit sums, weighed there
        self._refused_in_a_row = set[int]()  # periods, by first step, since the last commit that was not refused
        self._failing = Counter[int]()  # by worker: its commits refused since its last good one
        self._good = set[int]()  # workers whose last commit was good
        self._released = set[int]()  # workers whose leases were taken back
        self._samples = dict[int, int]()  # of workers with data of their own
        self.control = CONTINUE  # STOP asks all workers to leave
        self.checkpoint = 0  # steps at the newest checkpoint
        self.served = self.session = 0  # messages; sessions begun
        self.replicates_state = False  # its state is sent with c: a worker may have to take over

    @property
    def staleness_mean(self) -> float:
        """Mean staleness of the applied commits."""
        return self.staleness_sum / self.clock if self.clock else 0.0

    @property
    def settled(self) -> int:
        """Steps committed or given up: a run is over when all its steps are."""
        return self.steps + self.given_up

    def apply(self, commit: Commit, c: Array) -> Reply | None:
        """Apply `commit` to `c` in place, once, and return the reply to its requests.

        A commit that is not finite, or not to this model, is refused, and one of weight 0 dropped: nothing of it is
        applied, and its steps are free again, or given up where they have failed before (see Leases).

        Args:
            commit: a message; its payload is not changed.
            c: (n,) the center variable.

        Returns:
            The reply; None where a worker waits for work that others hold: its end tries the same message again after
            another is served or a worker is lost.

        Raises:
            RuntimeError: `patience` is exhausted, or all steps were given up.
            ValueError: the ranks differ in the number of steps, or this worker may not send this commit.
        """
        status, leases = OK, self.leases
        self.waiting.discard(commit.worker)
        if commit.commits != 1 and commit.worker not in self.nodes and not self.rule.allreduce:
            commit = commit._replace(commits=1, parts=(), flags=commit.flags | MISFIT)
        if commit.requests & STOP_ALL:
            self.control = STOP
        has_delta = commit.payload is not None or bool(commit.flags & (MISFIT | NOT_FINITE))
        if has_delta:
            status = self._receive(commit, c)
        elif leases and commit.requests & WORK and commit.total != leases.encoded_total:
            raise ValueError(
                f"worker {commit.worker} asks for {_describe_total(commit.total)}, the center for "
                f"{_describe_total(leases.encoded_total)}: all ranks must give the same number of steps"
            )
        control, work = self._grant(commit)
        if control == WAIT and commit.requests & IDLE and not has_delta:
            self.waiting.add(commit.worker)
            return None
        self.served += 1
        if has_delta and status == OK:  # if the observer saves c, this reply tells the worker to save its state
            self.observer.committed(commit, c)
        replicates = self.replicates_state and commit.requests & PULL
        reply = Reply(
            self.clock,
            status,
            control,
            work=work,
            steps=self.steps,
            checkpoint=self.checkpoint,
            period=leases.period_of(commit.worker) if leases and work.steps else 1,
            applied=tuple(self.applied) if replicates else (),
            snapshot=self._snapshot(leases) if replicates and leases else None,
        )
        self.observer.served(commit, reply)
        return reply

    def _grant(self, commit: Commit) -> tuple[int, Lease]:
        """The reply's control, and the lease that it grants, if the commit asks for one."""
        leases = self.leases
        if leases and commit.requests & LEAVE:
            leases.forget(commit.worker)
        elif leases and commit.requests & IDLE:
            leases.release_all(commit.worker)
        if not leases or not commit.requests & WORK or self.control == STOP:
            return self.control, NONE
        # A worker that may wait leaves steps at which it has failed to the others, as long as others are at work.
        skip_failed = self.idle_workers_wait and (leases.held or not commit.requests & IDLE)
        wanted, left = commit.wanted, leases.left
        periods = wanted if commit.worker in self.nodes else fair(wanted, left, leases.period, self.workers)
        work = leases.grant(commit.worker, skip_failed, periods)
        waits = work == NONE and self.idle_workers_wait and (leases.held or leases.free)
        return WAIT if waits else self.control, work

    def _snapshot(self, leases: Leases) -> Snapshot:
        staleness = self.staleness_sum, self.staleness_max
        failed = self.refused, self.dropped, leases.given_up
        return Snapshot(self.served, self.session, leases.next, *staleness, *failed, tuple(leases.open()))

    def _receive(self, commit: Commit, c: Array) -> int:
        """Apply, refuse or drop a delta; returns the status of the reply."""
        self.processed[commit.worker] = max(self.processed.get(commit.worker, 0), commit.sequence)
        if not self.rule.allreduce and commit.sequence <= self.applied[commit.worker]:
            return DUPLICATE
        leases = self.leases
        if commit.worker in self._released and commit.worker not in self.nodes:
            self.counted.add(commit.worker)  # it was silent, and is back
        if commit.worker in self._released and leases and not leases.holds(commit.worker, *commit.leases):
            self._drop(commit)  # its lease went to another worker while it was silent
            return DROPPED
        if commit.flags & (NOT_FINITE | MISFIT):
            self._refuse(commit, c.nbytes)
            return REFUSED
        self._refused_in_a_row.clear()
        self._good.add(commit.worker)
        self._failing.pop(commit.worker, None)
        if commit.samples:
            self._samples[commit.worker] = commit.samples
        weight = self.weight(commit)
        if not weight:
            self._drop(commit)
            return DROPPED
        if leases:  # before the step: a commit without a lease must not move c
            for done in self._parts(commit):
                leases.commit(commit.worker, done)
        self._step(commit, c, weight)
        if not self.rule.allreduce:
            self.applied[commit.worker] = commit.sequence
        return OK

    def _parts(self, commit: Commit) -> Iterator[Lease]:
        """The steps in a commit, each part a lease of its worker."""
        for done in commit.leases:
            if self.leases and commit.worker in self.nodes:
                self.leases.carve(commit.worker, done)
            yield done

    def _drop(self, commit: Commit) -> None:
        self.dropped += 1
        if self.leases:
            for done in self._parts(commit):
                self.leases.release(commit.worker, done)

    def _refuse(self, commit: Commit, nbytes: int) -> None:
        leases = self.leases
        self.refused += 1
        if self.rule.allreduce:  # all ranks refuse alike, and go on to the next round
            self.given_up += commit.steps
            self._refused_in_a_row.add(self.refused)
        elif commit.steps:  # a period that fails repeatedly counts once; without steps another one has failed
            self._refused_in_a_row.add(commit.leases[0].first)
        for done in self._parts(commit):
            if leases and leases.refuse(commit.worker, done):
                self.given_up += done.steps
                self.observer.given_up(done)
        self._good.discard(commit.worker)
        self._failing[commit.worker] += 1
        in_a_row, failures = len(self._refused_in_a_row), self._failing[commit.worker]
        if failures in _NAMED and self.workers > 1 and not self.rule.allreduce:
            self.observer.failing(commit.worker, failures)
        nothing_is_left = bool(leases and leases.total and leases.given_up == leases.total)
        others = leases.awaited(set(range(self.workers)) - self._released) - self._failing.keys() if leases else None
        if not nothing_is_left and (in_a_row < self.patience or others):
            return
        if nothing_is_left or not self._good:  # else the others are done: they keep what they have
            sender = "node center" if commit.worker in self.nodes else "worker"
            error = (
                f"{in_a_row} commits in a row were refused, the last from {sender} {commit.worker} (steps from "
                f"{commit.leases[0].first}): "
                + (
                    f"it is no commit to this model: {commit.nbytes} bytes, the center has {nbytes}"
                    if commit.flags & MISFIT
                    else "they hold NaN or infinity; lower the rate, clip the gradients, or look at these samples"
                )
            )
            self.observer.diverged(RuntimeError(error))
        self.control = STOP

    def worker_lost(self, worker: int) -> None:
        """A worker is lost, for good or for a while: its uncommitted steps are free for the others."""
        self.worker_released(worker)
        self.waiting, self.counted = self.waiting - {worker}, self.counted - {worker}
        self._samples.pop(worker, None)
        if self.leases:
            self.leases.forget(worker)

    def worker_released(self, worker: int) -> None:
        """This worker may commit steps that now belong to others: such commits are dropped."""
        self._released.add(worker)

    def move(self, like: Array) -> None:
        """Move the slots to where `like` (n,) lies."""
        if self.optimizer is not None:
            slots = {f"slot/{name}": slot for name, slot in self.optimizer.slots(self.state).items()}
            self.state = self.optimizer.restore(self.optimizer.init(like), slots, self.state.step)

    def save(self, c: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        """Copy to the host what a checkpoint stores: `c` (n,), the slots, and their metadata."""
        slots = self.optimizer.slots(self.state) if self.optimizer else {}
        arrays = {"c": host_copy(c)} | {f"slot/{name}": host_copy(slot) for name, slot in slots.items()}
        return arrays, {
            "clock": self.clock,
            "steps": self.steps,
            "applied": list(self.applied),
            "processed": [self.processed.get(worker, 0) for worker in range(self.workers)],
            "given_up": self.given_up,
            "served": self.served,
            "session": self.session,
            "refused": self.refused,
            "dropped": self.dropped,
            "staleness": [self.staleness_sum, self.staleness_max],
            "center_optimizer": self.optimizer.name if self.optimizer else "add",
            "center_optimizer_step": self.state.step if self.optimizer else 0,
            "leases": self.leases.state() if self.leases else self.division and self.division(),
        }

    def restore(self, arrays: Mapping[str, Array], facts: Mapping[str, Any], c: Array) -> None:
        """Restore what `save` returned; vectors are of this center. Raises ValueError for another optimizer."""
        name = self.optimizer.name if self.optimizer else "add"
        if facts["center_optimizer"] != name:
            raise ValueError(f"the checkpoint's center optimizer is {facts['center_optimizer']}, not {name}")
        c[...] = bring(arrays["c"], c)
        self.clock, self.steps, self.refused = int(facts["clock"]), int(facts["steps"]), int(facts["refused"])
        self.checkpoint, self.dropped = self.steps, int(facts.get("dropped", 0))
        self.given_up, self.served = int(facts.get("given_up", 0)), int(facts.get("served", 0))
        self.staleness_sum, self.staleness_max = map(int, facts["staleness"])
        if self.optimizer:
            self.state = self.optimizer.restore(self.state, arrays, int(facts["center_optimizer_step"]))

    def weight(self, commit: Commit) -> float:
        """The weight of `commit` by the rule, were it applied now; 0: drop it. A node center's sum counts whole.

        Raises ValueError for a pull from the future.
        """
        staleness = self.clock - commit.clock
        if staleness < 0:
            raise ValueError(f"worker {commit.worker} has pulled at clock {commit.clock}, but it is {self.clock} now")
        if commit.worker in self.nodes:
            return 1.0
        share = 1 / self.alive
        if commit.worker in self._samples:  # those that have told nothing yet count as the mean of those that have
            share *= self._samples[commit.worker] * len(self._samples) / sum(self._samples.values())
        return self.rule.weight(CommitInfo(staleness, commit.commits, commit.steps, self.alive, share))

    @property
    def alive(self) -> int:
        """n of the weights: workers that are not lost or silent, at least 1."""
        return len(self.counted) or 1

    def _buffers(self, commit: Commit) -> tuple[Array, float] | None:
        """The buffers of a commit, and their weight; None without buffers."""
        if not self.rule.buffers or commit.payload is None:
            return None
        b = commit.payload[-self.rule.buffers :]
        if self.rule.allreduce:
            return b / commit.commits, 1.0
        return b, 1 - (1 - 1 / self.alive) ** commit.commits  # 1/n; a node center sends the mean of its commits'

    def _step(self, commit: Commit, c: Array, weight: float) -> None:
        assert commit.payload is not None
        staleness = self.clock - commit.clock
        delta, encoding = commit.payload, commit.encoding
        self.state = center_step(
            c, delta, weight, self.optimizer, self.state, self.steps, self.on_block, encoding, self._buffers(commit)
        )
        self.clock += commit.commits
        self.steps += commit.steps
        self.staleness_sum += staleness * commit.commits
        self.staleness_max = max(self.staleness_max, staleness)


class SummedCenter(Center):
    """The center's state where the workers sum into the center variable themselves: it counts their commits.

    Args:
        end: knows the counters that the workers keep.
    """

    def __init__(self, rule: Rule, like: Array, workers: int, end: CenterEnd, observer: Observer) -> None:
        super().__init__(rule, like, workers, observer=observer)
        self._end, self._in_a_row = end, 0  # the second: commits refused since the last good one

    def apply(self, commit: Commit, c: Array) -> Reply:
        """Update the counts; raises RuntimeError where `patience` is exhausted."""
        summed = self._end.summed
        self._in_a_row = 0 if commit.commits else self._in_a_row + summed.refused - self.refused
        if self._in_a_row >= self.patience * self.workers:  # all fail: one that does leaves after `patience` of them
            self.observer.diverged(RuntimeError(f"{self._in_a_row} commits in a row were refused: NaN or infinity"))
            self.control = STOP
        self.refused, self.staleness_sum, self.staleness_max, self.given_up = summed
        self.clock, self.steps = self.clock + commit.commits, self.steps + commit.steps
        self.observer.committed(commit, c)
        return Reply(self.clock)

    def save(self, c: Array) -> tuple[dict[str, Array], dict[str, Any]]:
        """As `Center.save`, of one moment, while no worker sums; raises OSError where that cannot be said."""
        with self._end.still() as cut:
            arrays, facts = super().save(c)
        return arrays, facts | cut._asdict()


def _describe_total(total: int) -> str:
    return "steps without end" if total < 0 else f"{total} steps"


def serve(end: CenterEnd, apply: Apply, between_messages: Callable[[], None] | None = None) -> None:
    """Serve the workers until all have left; yield the core while no message arrives.

    `apply`: processes a message, usually `Center.apply`; `between_messages`: called after each message and, while there
    is none, at each wake-up; it must not block.
    """
    end.open()
    backoff, seen = Backoff(longest=end.longest_sleep), 0
    while end.live:
        served = end.serve_one(apply)
        if served or seen != (seen := end.progress):
            backoff.reset()
        if not served:
            backoff.wait()
        if between_messages:
            between_messages()
