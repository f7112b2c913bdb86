"""The loops that drive workers: over MPI, several in one thread, or with a virtual clock."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

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
        step = worker.step_number
        loss, g = gradient(step)
        worker.local_step(g, loss)
        yield step
        yield from worker.waits_after_step()
    yield from worker.waits_to_leave()
    yield from worker.waits_to_settle()
