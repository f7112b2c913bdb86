"""The contract between a worker, a center and whatever carries their messages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from collections.abc import Set as AbstractSet
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from ..arrays.backend import Array
from .backoff import wait_until
from .messages import Commit, Reply


class Elected(Exception):
    """Raised by a handle: the center is lost, and this rank is to serve now instead of training."""


class Capabilities(NamedTuple):
    """What a transport gives; setup refuses what does not fit, and the conformance suite tests what is declared."""

    center_ranks: bool = False  # some ranks serve the center variable, and do not train
    together: bool = False  # all ranks train, and exchange at the same time
    whole_pulls: bool = True  # no pull holds a part of a commit
    exact_clock: bool = True  # the clock that comes with a pull counts the commits in it
    single_commits: bool = True  # the center sees each commit: it weighs, refuses, optimizes, and grants the work
    message_order: bool = False  # the order of messages at the center repeats a run
    shards: bool = False  # several center ranks may hold a block each
    silent_workers: bool = False  # the center can go on without a worker that is silent
    outlives_loss: bool = False  # where MPI tells who has died, workers and center go on without them
    device_center: bool = False  # the center variable may lie on a GPU
    direct: bool = False  # device pointers may be handed to MPI
    overlap: bool = True  # exchanges take time, in which a worker can compute


# Applies a commit (or serves a request) to the center variable c, in place, and answers. None: not yet, the worker
# waits for work that others hold; its end asks again with the same message when another was served or a worker lost.
Apply: TypeAlias = Callable[[Commit, Array], Reply | None]


class Handle(Protocol):
    """An exchange under way."""

    def test(self) -> bool:
        """Make progress without blocking; whether the exchange is done."""

    def wait(self) -> Reply:
        """Finish the exchange; may be called again."""


T = TypeVar("T")
Waits: TypeAlias = Generator[Handle, None, T]  # what must wait, as a generator of the handles to wait for


class WorkerEnd(ABC):
    """A worker's side. One exchange at a time; the payload must not change before its handle is done."""

    def begin(self, total: int | None, period: int, start: int) -> None:
        """Begin a session of `total` steps (None: no end), the first `start` of them done; λ = `period`; collective."""

    @abstractmethod
    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Send `commit`; pull the center (n,) as it is afterwards into `out`, unless None."""

    @abstractmethod
    def pull(self, out: Array) -> Handle:
        """Pull the center (n,) into `out`; it includes this worker's earlier commits."""

    @abstractmethod
    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """End this worker's part with a last commit, if any, without blocking.

        The handle is done when all workers have left, with the final center in `out`.
        """

    def close(self) -> None:
        """Free what the end holds; collective."""


class Summed(NamedTuple):
    """Counts of a center into which the workers sum by themselves."""

    refused: int = 0  # commits that their workers did not sum, since they were not finite
    staleness_sum: int = 0
    staleness_max: int = 0


class CenterEnd(ABC):
    """The center's side; it owns the memory of the center variable."""

    hold: Callable[[Commit], bool] | None = None  # a commit that it names is not taken up now
    on_loss: Callable[[int], None] | None = None  # told of each worker that has died; else the error is raised

    lost: AbstractSet[int] = frozenset()  # workers that have died
    silent: AbstractSet[int] = frozenset()  # workers that nobody waits for, until they are heard of again

    @property
    def deserted(self) -> bool:
        """Whether all workers were lost, and none has left."""
        return False

    def stop_waiting_for(self, worker: int) -> None:
        """Wait for this silent worker no longer."""
        raise NotImplementedError(f"{type(self).__name__} waits for all workers")

    @property
    @abstractmethod
    def c(self) -> Array:
        """(n,) the center variable; it may move in memory from message to message."""

    @property
    @abstractmethod
    def live(self) -> int:
        """Workers that have not left this session."""

    @property
    @abstractmethod
    def progress(self) -> int:
        """A number that changes whenever a message, or a piece of one, has come or gone."""

    @property
    def in_hand(self) -> int:
        """Deltas whose receive has begun, and that are not applied yet."""
        return 0

    def begin(self, total: int | None, period: int, start: int) -> None:
        """Begin a session, as `WorkerEnd.begin`; collective."""

    def resume(self, clock: int, steps: int, staleness: tuple[int, int], refused: int) -> None:
        """Go on from the counts of a checkpoint; `staleness`: sum and maximum."""

    @property
    def summed(self) -> Summed:
        """What the workers have summed by themselves so far."""
        return Summed()

    def open(self) -> None:
        """Begin to serve a session: all workers are expected."""

    @abstractmethod
    def serve_one(self, apply: Apply) -> bool:
        """Make progress and serve at most one message; whether one was served."""

    def move_on(self, stop: int) -> None:
        """While a commit is applied, and c is done up to `stop`: see to the other messages."""

    def tell(self, control: int, checkpoint: int) -> None:
        """What the replies to come shall say, where the center gives no reply itself."""

    def close(self) -> None:
        """Free what the end holds; collective."""


def run_waits(waits: Waits[T]) -> T:
    """Run `waits` to its end, waiting for each handle."""
    while True:
        try:
            handle = next(waits)
        except StopIteration as end:
            value: T = end.value
            return value
        handle.wait()


class InTurn:
    """Several exchanges of one worker, sent one behind the other; the reply is the last one's."""

    def __init__(self, *handles: Handle) -> None:
        self._handles = handles

    def test(self) -> bool:
        """Make progress on all; whether all are done."""
        return sum([handle.test() for handle in self._handles]) == len(self._handles)

    def wait(self) -> Reply:
        """Finish all."""
        return [handle.wait() for handle in self._handles][-1]


class Polled:
    """A handle that asks `attempt(patient)` until it gives the reply; patient is who has nothing else to do."""

    def __init__(self, attempt: Callable[[bool], Reply | None]) -> None:
        self._attempt = attempt
        self._reply: Reply | None = None

    def _try(self, patient: bool) -> bool:
        if self._reply is None:
            self._reply = self._attempt(patient)
        return self._reply is not None

    def test(self) -> bool:
        """Ask once more, if need be; whether the reply is there."""
        return self._try(False)

    def wait(self) -> Reply:
        """Ask until the reply is there."""
        wait_until(partial(self._try, True))
        assert self._reply is not None
        return self._reply


class Done:
    """The handle of an exchange that needed no waiting."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def test(self) -> bool:
        """Always true."""
        return True

    def wait(self) -> Reply:
        """Return the reply."""
        return self._reply
