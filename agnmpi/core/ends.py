"""The contract between a worker, a center and whatever carries their messages."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from ..arrays.backend import Array
from .backoff import wait_until
from .messages import Commit, Reply


class Elected(Exception):
    """Raised by a handle: the center is lost, and this rank is to serve now instead of training."""


class Capabilities(NamedTuple):
    """What an end gives; launch refuses a rule on a transport that lacks what the rule needs."""

    server: bool  # a center rank applies commit by commit; else all ranks step together
    whole_pulls: bool = True
    exact_clock: bool = True
    weights: bool = True
    center_optimizer: bool = True
    refusal: bool = False  # of commits that are not finite
    replay: bool = True
    survives_loss: bool = False


# Applies a commit (or serves a request) to the center variable c, in place, and answers. None: not yet, the worker
# waits for work that others hold; its end asks again with the same message when another was served or a worker lost.
Apply: TypeAlias = Callable[[Commit, Array], Reply | None]


class Handle(Protocol):
    """An exchange under way."""

    def test(self) -> bool:
        """Make progress without blocking; whether the exchange is done."""

    def wait(self) -> Reply:
        """Finish the exchange; may be called again."""


class WorkerEnd(Protocol):
    """A worker's side. One exchange at a time; the payload must not change before its handle is done."""

    capabilities: Capabilities

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Send `commit`; pull the center (n,) as it is afterwards into `out`, unless None."""

    def pull(self, out: Array) -> Handle:
        """Pull the center (n,) into `out`; it includes this worker's earlier commits."""

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """End this worker's part with a last commit, if any, without blocking.

        The handle is done when all workers have left, with the final center in `out`.
        """

    def close(self) -> None:
        """Free what the end holds; collective."""


class CenterEnd(Protocol):
    """The center's side; it owns the memory of the center variable."""

    @property
    def c(self) -> Array:
        """(n,) the center variable; it may move in memory from turn to turn."""

    @property
    def live(self) -> int:
        """Workers that have not left this session."""

    @property
    def progress(self) -> int:
        """A number that changes whenever a message, or a piece of one, has come or gone."""

    def open(self) -> None:
        """Begin a session: all workers are expected."""

    def serve_one(self, apply: Apply) -> bool:
        """Make progress and serve at most one message; whether one was served."""

    def close(self) -> None:
        """Free what the end holds; collective."""


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


class Pause:
    """A handle that is done when some seconds are over."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def test(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._until

    def wait(self) -> Reply:
        """Sleep until then."""
        time.sleep(max(0.0, self._until - time.monotonic()))
        return Reply(0)


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
