"""What a run is in every framework: batches on workers, service and evaluation at the center, the end."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Self, TypeVar

import numpy as np

from ..arrays.backend import Array
from ..training.agn_optimizer import AGNOptimizer

Batch = TypeVar("Batch")


class Run(ABC):
    """A run on one rank; the classes of the frameworks say what their `opt` moves."""

    def __init__(self, opt: AGNOptimizer) -> None:
        self._opt = opt
        self._taken = True  # the step of this turn
        self._passes = 0  # over loaders

    def batches(self, loader: Iterable[Batch], steps: int | None = None) -> Generator[Batch, None, None]:
        """Yield batches of `loader` to train on, one for each step granted to this worker; on a center rank none.

        A turn without a step (gradients accumulate, a GradScaler skips it) does not count. Afterwards every rank has
        the center. It may be called again, epoch by epoch, and left with `break`.

        Args:
            loader: gone through again and again; its sampler's `set_epoch` is called, if it has one.
            steps: over all workers. None (default): each worker goes through its own loader once, and leaves.

        Raises:
            ValueError: for a loader without batches, where steps are to be taken.
        """
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

    def turns(self, steps: int | None = None) -> Generator[int, None, None]:
        """As `batches`, without a loader: yield the numbers of the steps, for a loop that fetches its own data."""
        self._opt.finish()  # after a break
        before = self._opt.taken
        with closing(self._opt.steps(steps)) as numbers:
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
