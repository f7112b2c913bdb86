"""Each sample once over all workers: batches of the steps that a worker is granted, for a loader that prefetches."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..core.batches import Plan


class Sampler:
    """A `batch_sampler` for a DataLoader: lists of indices, one for each step granted to this worker, in order.

    Args:
        plan: which samples belong to a step.
        granted: the numbers of the steps that this worker is to take, the next first.
    """

    def __init__(self, plan: Plan, granted: Callable[[], list[int]]) -> None:
        self.plan, self._granted = plan, granted
        self.start = 0  # steps of the plan that earlier loops have taken
        self.drawn = deque[int]()  # steps whose batches are being loaded, and not taken yet

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[list[int]]:
        self.drawn.clear()
        return _Draws(self._draw)

    def _draw(self) -> list[int] | None:
        steps = self._granted()
        if len(self.drawn) >= len(steps) or list(self.drawn) != steps[: len(self.drawn)]:
            return None
        step = steps[len(self.drawn)]
        self.drawn.append(step)
        return [int(i) for i in self.plan.indices(self.start + step)]


class _Draws:
    """An iterator that may go on after its end: a loader asks again when a batch is taken, and more may be granted."""

    def __init__(self, draw: Callable[[], list[int] | None]) -> None:
        self._draw = draw

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        indices = self._draw()
        if indices is None:
            raise StopIteration
        return indices


class Dealt:
    """The batches of a loader with a `Sampler`, by the numbers of their steps.

    A step that is granted out of order (after a refusal, a lost center) has the loader begin anew; one that was not
    taken (a GradScaler has skipped it) has its batch again.

    Args:
        loader: a DataLoader.
        sampler: its batch_sampler.
        begin: makes its iterators.
    """

    def __init__(self, loader: Any, sampler: Sampler, begin: Callable[[Any], Iterator[Any]]) -> None:
        self._loader, self._sampler, self._begin = loader, sampler, begin
        self._batches: Iterator[Any] | None = None
        self._last: tuple[int, Any] = -1, None

    def batch(self, step: int) -> Any:
        """The batch of this step, which is the next granted."""
        if step == self._last[0]:
            return self._last[1]
        drawn = self._sampler.drawn
        goes_on = self._batches is not None and (not drawn or drawn[0] == step)
        batch, found = self._next() if goes_on else (None, False)
        if not found:
            self._batches = self._begin(self._loader)
            batch, found = self._next()
        if not found:
            raise RuntimeError(f"the loader has no batch for step {step}: does it use run.sampler as batch_sampler?")
        drawn.popleft()
        self._last = step, batch
        return batch

    def _next(self) -> tuple[Any, bool]:
        assert self._batches is not None
        for batch in self._batches:
            return batch, True
        return None, False


def ahead(loader: Any, period: int) -> int:
    """Leases of `period` steps that `loader` may prefetch beyond the one that is computed."""
    prefetched = int(getattr(loader, "num_workers", 0)) * int(getattr(loader, "prefetch_factor", None) or 0)
    return -(-prefetched // period)
