"""The contract between a worker, a center and the transport of their messages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from ..arrays.backend import Array, bring
from .backoff import wait_until
from .leases import Leases
from .messages import Commit, Reply


class Elected(Exception):
    """Raised by a handle: the center is lost, and this rank was elected to serve instead of training."""


class Capabilities(NamedTuple):
    """What a transport offers; setup refuses what does not fit, and the conformance suite tests what is declared."""

    center_ranks: bool = False  # some ranks serve the center variable, and do not train
    together: bool = False  # all ranks train, and exchange at the same time
    whole_pulls: bool = True  # no pull sees part of a commit
    exact_clock: bool = True  # the clock that comes with a pull counts the commits in it
    # The center sees each commit: it weighs them, refuses them, steps an optimizer, grants leases.
    single_commits: bool = True
    message_order: bool = False  # the order of messages at the center repeats a run
    shards: bool = False  # several center ranks may hold a block each
    node_centers: bool = False  # a rank may be both a center to some and a worker of another center
    silent_workers: bool = False  # the center can go on without a worker that is silent
    windows: bool = False  # one-sided: under ULFM Open MPI may hang in them when a rank dies
    outlives_loss: bool = False  # where MPI reports failed ranks, workers and center go on without them
    device_center: bool = False  # the center variable may lie on a GPU
    direct: bool = False  # device pointers may be handed to MPI
    encodings: bool = False  # deltas and pulls may be encoded
    overlap: bool = True  # exchanges take time, in which a worker can compute


# Applies a commit (or serves a request) to the center variable c, in place, and returns the reply. None: not yet, the
# worker waits for work that others hold; the end tries the same message again after another is served or a worker lost.
Apply: TypeAlias = Callable[[Commit, Array], Reply | None]


class Handle(Protocol):
    """An exchange under way."""

    def test(self) -> bool:
        """Make progress without blocking; whether the exchange is done."""

    def wait(self) -> Reply:
        """Finish the exchange; may be called again."""


T = TypeVar("T")
Waits: TypeAlias = Generator[Handle, None, T]  # a coroutine: yields the handles that it must wait for


class WorkerEnd(ABC):
    """A worker's side. One exchange at a time; the payload must not change before its handle is done."""

    forms_deltas = False  # from x and o (`Commit.origin`), in the pass that encodes them; not of a last commit

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """Begin a session of `total` steps (None: no end), λ = `period`; `work`: what is left of them; collective."""

    @abstractmethod
    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Send `commit`; pull the center (n,) as it is afterwards into `out`, unless None."""

    @abstractmethod
    def pull(self, out: Array) -> Handle:
        """Pull the center (n,) into `out`; it includes this worker's earlier commits."""

    @abstractmethod
    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Leave the session with a last commit, if any, without blocking.

        The handle is done when all workers have left, with the final center in `out`, unless None.
        """

    @property
    def residual(self) -> Array | None:
        """(n,) what the encoding of its deltas has left behind, for checkpoints; None where nothing is left.

        The array does not change before another exchange is started.
        """
        return None

    def restore(self, residual: Array) -> None:
        """Continue from such a `residual`, if the end has one; between two exchanges."""

    def close(self) -> None:
        """Free what the end holds; collective."""


class Summed(NamedTuple):
    """Counters of a center into which the workers sum their deltas themselves."""

    refused: int = 0  # commits that their workers did not sum, since they were not finite
    staleness_sum: int = 0
    staleness_max: int = 0
    given_up: int = 0  # steps of the refused ones


class Cut(NamedTuple):
    """What belongs to a center variable into which the workers sum their deltas themselves."""

    clock: int
    steps: int
    given_up: int
    leases: Mapping[str, Any] | None  # as of `Leases.state`


class CenterEnd(ABC):
    """The center's side; it owns the memory of the center variable."""

    longest_sleep = 0.0  # seconds between two looks after a long time without a message, if more than usual
    hold: Callable[[Commit], bool] | None = None  # commits for which it is true are not processed now
    on_loss: Callable[[int], None] | None = None  # called with each worker that has died; None: the error is raised
    while_waiting: Callable[[], object] = bool  # called, often, while this end waits for others on its own account
    on_join: Callable[[int], None] | None = None  # called with each spare that takes the place of a lost worker

    lost: AbstractSet[int] = frozenset()  # workers that have died
    silent: AbstractSet[int] = frozenset()  # workers that nobody waits for, until they send something
    # Spares that were not called, and who has joined: the end waits for them no longer than AGNMPI_WATCHDOG seconds.
    dispensable: AbstractSet[int] = frozenset()

    @property
    def caveat(self) -> str:
        """What a user should know of this transport with this MPI on these hosts; empty if nothing."""
        return ""

    @property
    def deserted(self) -> bool:
        """Whether all workers were lost, and none has left."""
        return False

    @property
    def spares(self) -> Sequence[int]:
        """Workers that wait to take the place of a lost one, or were told that they are not needed any more."""
        return ()

    def flush(self) -> bool:
        """Make progress on replies; whether all are sent, but for those to silent workers and spares."""
        return True

    def admit(self, comm: Any) -> int:
        """Take in rank 0 of the remote group of `comm`, of another job, as a worker; returns its number."""
        raise NotImplementedError(f"{type(self).__name__} takes in nobody")

    def bury(self, worker: int) -> None:
        """A worker that was taken in has died, or has gone."""
        raise NotImplementedError(f"{type(self).__name__} takes in nobody")

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
        """A number that changes whenever a message, or a piece of one, was received or sent."""

    @property
    def in_flight_deltas(self) -> int:
        """Deltas whose receive has begun and that are not applied yet."""
        return 0

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """Begin a session, as `WorkerEnd.begin`; collective."""

    def resume(self, clock: int, steps: int, summed: Summed) -> None:
        """Restore the counts of a checkpoint."""

    @property
    def summed(self) -> Summed:
        """Counters that the workers keep themselves."""
        return Summed()

    def still(self) -> AbstractContextManager[Cut]:
        """Where the workers sum themselves: none does so, or is granted work, while in it."""
        raise NotImplementedError(f"{type(self).__name__} changes c itself")

    def start_from(self, c: Array) -> None:
        """Let the next session, which has not begun, start from `c` (n,)."""
        self.c[...] = bring(c, self.c)

    def change(self, change: Callable[[Array], None]) -> bool:
        """Between two messages: call `change(c)`, which changes c in place; False, and no call, if that must wait."""
        change(self.c)
        return True

    def retry(self) -> None:
        """Work may have come free without a message: `serve_one` tries the requests that wait for some again."""

    def open(self) -> None:
        """Begin to serve a session of all workers."""

    @abstractmethod
    def serve_one(self, apply: Apply) -> bool:
        """Make progress and serve at most one message; whether one was served."""

    def move_on(self, stop: int) -> None:
        """While a commit is being applied, and c is done up to `stop`: make progress on other messages."""

    def announce(self, control: int, checkpoint: int) -> None:
        """Set `control` and `checkpoint` of later replies, where the center does not write replies itself."""

    def close(self) -> None:
        """Free what the end holds; collective."""


def run_waits(waits: Waits[T]) -> T:
    """Run `waits` to its end, waiting on each handle."""
    while True:
        try:
            handle = next(waits)
        except StopIteration as end:
            value: T = end.value
            return value
        handle.wait()


def awaited(handle: Handle) -> Waits[Reply]:
    """Wait for `handle`, and return its reply."""
    yield handle
    return handle.wait()


def all_done(handles: Iterable[Handle]) -> bool:
    """Make progress on each of `handles`; whether all are done."""
    return not [handle for handle in handles if not handle.test()]


class Chained:
    """Several exchanges of one worker, sent in order; the reply is that of the last."""

    def __init__(self, *handles: Handle) -> None:
        self._handles = handles

    def test(self) -> bool:
        """Make progress on all; whether all are done."""
        return all_done(self._handles)

    def wait(self) -> Reply:
        """Finish all."""
        return [handle.wait() for handle in self._handles][-1]


class Polled:
    """A handle that calls `attempt(blocking)` until it returns the reply; blocking: the caller only waits."""

    def __init__(self, attempt: Callable[[bool], Reply | None]) -> None:
        self._attempt = attempt
        self._reply: Reply | None = None

    def _try(self, blocking: bool) -> bool:
        if self._reply is None:
            self._reply = self._attempt(blocking)
        return self._reply is not None

    def test(self) -> bool:
        """Try again, unless done; whether the reply is there."""
        return self._try(False)

    def wait(self) -> Reply:
        """Try until the reply is there."""
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
