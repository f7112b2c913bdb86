"""What a run is in every framework: batches on workers, service and evaluation at the center, the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Self, TypeVar

import numpy as np

from ..arrays.backend import Array
from ..core.batches import Plan
from ..loops.agn_optimizer import AGNOptimizer
from ..loops.terms import Status
from .sampler import Dealt, Sampler, ahead

Batch = TypeVar("Batch")


class Run(ABC):
    """A run on one rank; the classes of the frameworks say what their `opt` moves."""

    def __init__(self, opt: AGNOptimizer, period: int) -> None:
        self._opt, self._period = opt, period
        self._taken = True  # the step of this turn
        self._passes = 0  # over loaders
        self._evaluation: tuple[Callable[[Status], object] | None, int] = None, 1

    def evaluate(self, function: Callable[[Status], object], every: int) -> None:
        """Call `function(status)` at rank 0 while it serves, as often as every so many steps of all workers.

        What is trained holds the center meanwhile; `status` has its steps, clock, loss and speed. It runs in a thread
        (where all ranks train, between two steps) and must not call MPI. Its errors are reported, and training goes on.

        Args:
            function: the same on every rank, or on rank 0 alone; for the loops that begin from now on.
            every: at least 1.

        Raises:
            ValueError: for another `every`.
        """
        if every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, not {every}")

        def holding_the_center(status: Status) -> None:
            with self._holding(np.concatenate(list(status.center.values()))):
                function(status)

        self._evaluation = holding_the_center, every

    def batches(self, loader: Iterable[Batch], steps: int | None = None) -> Generator[Batch, None, None]:
        """Yield batches of `loader` to train on, one for each step granted to this worker; on a center rank none.

        A turn without a step (gradients accumulate, a GradScaler skips it) does not count. Afterwards every rank has
        the center. It may be called again, epoch by epoch, and left with `break`.

        Args:
            loader: gone through again and again; its sampler's `set_epoch` is called, if it has one.
            steps: over all workers. None (default): each worker goes through its own loader once, and leaves; through
                one with `sampler` all go together, until its epochs are dealt out.

        Raises:
            ValueError: for a loader without batches, where steps are to be taken.
        """
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, Sampler):
            yield from self._dealt(loader, sampler, steps)
            return
        source = self._batches_of(loader, endless=steps is not None)
        with closing(self.turns(steps)) as turns:
            for _ in turns:
                try:
                    batch = next(source)
                except StopIteration:  # one's own data end
                    break
                yield batch
            else:
                return
        self._finish()

    def sampler(self, dataset: Sized, batch: int, epochs: float, seed: int = 0) -> Sampler:
        """A `batch_sampler` for a DataLoader, which deals out each sample of an epoch once, over all workers.

        Fast workers get more. A batch belongs to one step: gradients do not accumulate over several.

        Args:
            dataset: of this length on every rank.
            batch: samples in a step.
            epochs: passes over the samples.
            seed: orders them.

        Raises:
            ValueError: for no samples, an empty batch, or no steps.
        """
        return Sampler(Plan(len(dataset), batch, epochs, seed=seed), lambda: self._opt.granted)

    def _dealt(self, loader: Any, sampler: Sampler, steps: int | None) -> Generator[Any, None, None]:
        """The batches of a loader with a `sampler`."""
        self._opt.finish()
        before, source = self._opt.taken, Dealt(loader, sampler)
        total = sampler.plan.steps - sampler.start if steps is None else steps
        try:
            with closing(self.turns(total, ahead(loader, self._period))) as turns:
                for number in turns:
                    yield source.batch(number - before)
        finally:
            sampler.start += self._opt.taken - before

    def turns(self, steps: int | None = None, ahead: int = 0) -> Generator[int, None, None]:
        """As `batches`, without a loader: yield the numbers of the steps, for a loop that fetches its own data.

        `ahead`: as of `AGNOptimizer.steps`.
        """
        self._opt.finish()  # after a break
        before = self._opt.taken
        with closing(self._opt.steps(steps, *self._evaluation, ahead)) as numbers:
            for number in numbers:
                self._turn(before + number)
                self._taken = False
                yield before + number
                if not self._taken:
                    self._opt.skip()
        self._finish()

    def _finish(self) -> None:
        """Wait for the other workers, and take the final center."""
        self._opt.finish()
        self._turn(self._opt.taken)

    def _batches_of(self, loader: Iterable[Batch], endless: bool) -> Iterator[Batch]:
        """The batches of `loader`, once or again and again; its iterator begins with the first: never at a center."""
        while True:
            set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
            if set_epoch:
                set_epoch(self._passes)
            self._passes += 1
            empty = True
            for batch in loader:
                empty = False
                yield batch
            if not endless:
                return
            if empty:
                rank = self._opt.comm.rank
                raise ValueError(f"rank {rank}: the loader has no batches, but there are steps to be taken")

    def _turn(self, step: int) -> None:
        """Step number `step` of all loops and workers is about to be taken, or would be next."""

    def _step(self) -> None:
        """Count the step that was taken, and exchange when λ are done."""
        self._taken = True
        self._opt.step()

    @contextmanager
    def center(self) -> Generator[Any, None, None]:
        """Within it what is trained holds the center as this rank knows it; afterwards this rank's own again."""
        with self._holding(np.concatenate(list(self._opt.center.values()))) as held:
            yield held

    @abstractmethod
    def _holding(self, x: Array) -> AbstractContextManager[Any]:
        """Within it what is trained holds `x` (n,)."""

    def stop(self) -> None:
        """End the loop for all, from any rank or evaluation; as `AGNOptimizer.stop`."""
        self._opt.stop()

    @property
    def status(self) -> Status:
        """How far the run is, as this rank knows it. Never blocks."""
        return self._opt.status

    @property
    def is_center(self) -> bool:
        """Whether this rank serves, and does not train."""
        return self._opt.is_center

    @property
    def workers(self) -> int:
        """Number of workers n."""
        return self._opt.num_workers

    def close(self) -> None:
        """End it; collective. What was trained is the center."""
        self._opt.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error the other ranks do not call the collective close
            self.close()
