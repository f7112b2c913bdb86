"""The center's state, and the loop of a center rank."""

from collections.abc import Callable
from typing import Any

from .backend import Array
from .data import NONE, Lease, Leases
from .optimizers import Optimizer
from .rules import Rule, Seen, center_step
from .transport.base import DROPPED, DUPLICATE, LEAVE, OK, WORK, Apply, CenterEnd, Commit, Reply
from .waiting import Idle


class Center:
    """All that the center knows beside the center variable itself, which its end holds.

    `like`: the center variable (n,); `workers`: n; `optimizer`: the center optimizer, None to add.
    """

    def __init__(self, rule: Rule, like: Array, workers: int, optimizer: Optimizer | None = None) -> None:
        self.rule, self.workers, self.optimizer = rule, workers, optimizer
        self.state: Any = optimizer.init(like) if optimizer else None
        self.clock = 0
        self.applied = [0] * workers  # last sequence, by worker
        self.between: Callable[[], None] | None = None  # called between blocks of a step: messages move on meanwhile
        self.leases: Leases | None = None  # None: the work is shared out elsewhere
        self.now: Callable[[], float] | None = None  # what measures the workers' speeds, where λ_k goes by them
        self.staleness_sum = self.staleness_max = 0
        self.steps = 0  # local steps in all applied commits
        self.dropped = 0  # commits that weighed nothing

    @property
    def staleness_mean(self) -> float:
        """Mean staleness of the applied commits."""
        return self.staleness_sum / self.clock if self.clock else 0.0

    def apply(self, commit: Commit, c: Array) -> Reply:
        """Apply `commit` to `c` in place, once, and answer what it asks for."""
        status = OK
        if self.leases and commit.payload is None and commit.wants & WORK and commit.first != self.leases.total_said:
            raise ValueError(
                f"worker {commit.worker} asks for {_said(commit.first)}, the center for "
                f"{_said(self.leases.total_said)}: all ranks must give the same number of steps"
            )
        if commit.payload is not None:
            if self.rule.collective:
                self._step(commit, c)
            elif commit.sequence <= self.applied[commit.worker]:
                status = DUPLICATE
            elif not self.weight(commit):
                status = DROPPED
                self.dropped += 1
                if self.leases:
                    self.leases.refuse(commit.worker, Lease(commit.first, commit.steps))
            else:
                self._step(commit, c)
                self.applied[commit.worker] = commit.sequence
                if self.leases:
                    self.leases.commit(commit.worker, Lease(commit.first, commit.steps))
        if self.leases and commit.wants & LEAVE:
            self.leases.release(commit.worker)
        work = self.leases.grant(commit.worker) if self.leases and commit.wants & WORK else NONE
        return Reply(self.clock, status, work=work, steps=self.steps, applied=tuple(self.applied))

    def weight(self, commit: Commit) -> float:
        """The weight of `commit` by the rule, were it applied now; 0: it is to be dropped."""
        return self.rule.weight(Seen(self.clock - commit.clock, commit.commits, commit.steps, self.workers))

    def _step(self, commit: Commit, c: Array) -> None:
        assert commit.payload is not None
        staleness = self.clock - commit.clock
        self.state = center_step(
            c, commit.payload, self.weight(commit), self.optimizer, self.state, self.steps, self.between
        )
        self.clock += commit.commits
        self.steps += commit.steps
        self.staleness_sum += staleness * commit.commits
        self.staleness_max = max(self.staleness_max, staleness)


def _said(total: int) -> str:
    return "steps without end" if total < 0 else f"{total} steps"


def serve(end: CenterEnd, apply: Apply, on_turn: Callable[[], None] | None = None) -> None:
    """Serve the workers until all have left; yield the core while nothing arrives.

    `apply`: what a message does, usually `Center.apply`; `on_turn`: called after each message and, while it is
    quiet, at each wake-up; it must not block.
    """
    end.open()
    idle, seen = Idle(), 0
    while end.live:
        served = end.serve_one(apply)
        if served or seen != (seen := end.progress):
            idle.reset()
        if not served:
            idle.wait()
        if on_turn:
            on_turn()
