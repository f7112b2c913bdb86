"""The loops that drive workers: over MPI, several in one thread, or with a clock of the driver's own."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from ..arrays.backend import Array
from .ends import Handle
from .worker import Worker


def drive(loops: list[Iterator[int]]) -> None:
    """Run the loops of several workers in one thread, a step of each in turn."""
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
    """As `train`, for a driver that must not wait: a step's number when it is computed, each handle to wait for.

    The driver goes on after a step when the step's time is over, and after a handle when that is done.
    """
    yield from worker.waits_to_begin()
    while (yield from worker.waits_for_work()):
        step = worker.step_number
        loss, g = gradient(step)
        worker.local_step(g, loss)
        yield step
        yield from worker.waits_after_step()
    yield from worker.waits_to_leave()
    yield from worker.waits_to_settle()
