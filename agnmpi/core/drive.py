"""The loops that drive workers: over MPI, several in one thread, with a virtual clock, or without ever blocking."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from math import nan

from ..arrays.backend import Array
from .ends import Handle
from .worker import Worker


def drive(loops: list[Iterator[int]]) -> None:
    """Run the loops of several workers in one thread, round-robin by steps."""
    while loops:
        loops = [loop for loop in loops if next(loop, None) is not None]


def train(
    worker: Worker,
    gradient: Callable[[int], tuple[float, Array]],
) -> Generator[int, None, None]:
    """Drive `worker` to the end of its work; yields after each step, so that several can share a thread.

    `gradient(step) -> (loss, g)`: loss and gradient (n,) of the worker's x at the batch of that step.
    """
    with closing(worker.steps()) as steps:
        for step in steps:
            loss, g = gradient(step)
            worker.step(g, loss)
            yield step


def session(worker: Worker, gradient: Callable[[int], tuple[float, Array]]) -> Generator[int | Handle, None, None]:
    """As `train`, for a driver that must not block: yields each step's number once computed, and each handle to await.

    The driver resumes it when the step's time is over, or when the handle is done.
    """
    yield from worker.waits_to_begin()
    while (yield from worker.waits_for_work()):
        step = worker.held.number
        loss, g = gradient(step)
        worker.local_step(g, loss)
        yield step
        yield from worker.waits_after_step()
    yield from worker.waits_to_leave()
    yield from worker.waits_to_settle()


class Unblocking:
    """Drives a worker within a program that must not wait: it goes on only while nothing has to be waited for.

    Args:
        worker: to be driven through one session.

    >>> import numpy as np
    >>> from agnmpi.core import rules
    >>> from agnmpi.core.center import Center
    >>> from agnmpi.core.leases import Leases
    >>> from agnmpi.core.optimizers import sgd
    >>> from agnmpi.transport.local import LocalCenter
    >>> center = Center(rules.agn(), np.zeros(1), workers=1)
    >>> center.leases = Leases(total=2, period=2)
    >>> local = LocalCenter(np.zeros(1), 1, center.apply)
    >>> worker = Worker(np.ones(1), rules.agn(), sgd(0.5), local.worker_end(0), 0)
    >>> worker.total = 2
    >>> training = Unblocking(worker)
    >>> training.is_due()  # the center has not answered yet
    False
    >>> while not training.finished:
    ...     served = local.serve_one(center.apply)
    ...     if training.is_due():
    ...         training.step(np.full(1, -1.0))
    >>> local.c
    array([0.5])
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.finished = False  # no step is left for this worker, or it leaves
        self.left = False  # all workers have left, and it has the final center
        self._leaving = False
        self._session = self._drive()
        self._handle: Handle | None = None  # what must be waited for; None: a step, or the order to leave
        self._g: tuple[Array | None, float] = None, nan
        self._resume()

    def is_due(self) -> bool:
        """Make progress without blocking; whether a step is to be taken now."""
        while self._handle is not None and self._handle.test():
            self._resume()
        return self._handle is None and not self.finished

    def step(self, g: Array | None, loss: float = nan) -> None:
        """Take the step that is due; arguments as of `Worker.local_step`."""
        assert self.is_due()
        self._g = g, loss
        self._resume()

    def leave(self) -> None:
        """Commit the steps done and leave, as soon as that can be done: `is_due` goes on with it."""
        self._leaving = True
        if self._handle is None and not self.left:
            self._resume()

    def _resume(self) -> None:
        self._handle = None
        self._handle = next(self._session, None)

    def _drive(self) -> Generator[Handle | None, None, None]:
        worker = self.worker
        yield from worker.waits_to_begin()
        while not self._leaving and (yield from worker.waits_for_work()):
            if not self._leaving:
                yield None
            if self._leaving:
                break
            worker.local_step(*self._g)
            yield from worker.waits_after_step()
        self.finished = True
        while not self._leaving:  # to leave takes the others, who may be anywhere
            yield None
        yield from worker.waits_to_leave()
        yield from worker.waits_to_settle()
        self.left = True
