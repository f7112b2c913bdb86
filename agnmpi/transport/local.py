"""Ends within one process: for one-process runs, for tests of rules, and for virtual time."""

from collections import deque
from collections.abc import Callable

from ..arrays.backend import Array
from ..arrays.encodings import encode_pull, get
from ..core.ends import Apply, CenterEnd, Chained, Handle, WorkerEnd
from ..core.messages import ENCODED, LEAVE, PULL, Commit, Reply


class LocalCenter(CenterEnd):
    """The center's end: a queue of messages, served in order of arrival.

    Args:
        c: (n,) center variable, moved in place.
        workers: their number.
        apply: processes the messages that a worker's `wait` serves.
        pull_encoding: of c, for those who ask for it.
    """

    live = progress = 0  # workers that have not left; nothing here takes time

    def __init__(self, c: Array, workers: int, apply: Apply, pull_encoding: str = "float32") -> None:
        self._c, self.live, self.pull_encoding = c, workers, get(pull_encoding)
        self.apply = apply
        self._workers = workers
        self._queue: deque[LocalHandle] = deque()
        self._parked: deque[LocalHandle] = deque()  # requests of workers that wait for work
        self._retry = False

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._c

    def worker_end(self, worker: int) -> "LocalWorker":
        """The end of worker number `worker`."""
        return LocalWorker(self, worker)

    def put(self, handle: "LocalHandle") -> None:
        """Queue a message."""
        self._queue.append(handle)

    def open(self) -> None:
        """Begin a session."""
        self.live = self._workers

    def retry(self) -> None:
        """Try the requests that wait for work again."""
        self._retry = True

    def serve_one(self, apply: Apply) -> bool:
        """Serve the oldest message, and then the workers that wait for work, if there is some."""
        retry, self._retry = self._retry, False
        if not self._queue:
            return retry and self._serve_parked(apply)
        handle = self._queue.popleft()
        if not self._serve(handle, apply):
            self._parked.append(handle)
        self._serve_parked(apply, handle)
        return True

    def _serve_parked(self, apply: Apply, tried: "LocalHandle | None" = None) -> bool:
        """Answer the requests before `tried` for which there is work; whether there was any."""
        served = False
        while self._parked and self._parked[0] is not tried and self._serve(self._parked[0], apply):
            self._parked.popleft()
            served = True
        return served

    def _serve(self, handle: "LocalHandle", apply: Apply) -> bool:
        """Whether `handle` could be answered."""
        reply = apply(handle.commit, self.c)
        if reply is None:
            return False
        if handle.commit.requests & LEAVE:
            self.live -= 1
        if handle.commit.requests & ENCODED and handle.out is not None:
            encode_pull(self.pull_encoding, self.c, handle.out, reply.clock)
        elif handle.out is not None:
            handle.out[...] = self.c
        handle.reply = reply
        handle.on_reply()
        return True


class LocalHandle:
    """A queued message; waiting for it makes the center serve up to it.

    `on_reply` is called when it is answered.
    """

    def __init__(self, center: LocalCenter, commit: Commit, out: Array | None) -> None:
        self.commit, self.out = commit, out
        self.reply: Reply | None = None
        self.on_reply: Callable[[], object] = lambda: None
        self._center = center

    def test(self) -> bool:
        """Whether the message has been served."""
        return self.reply is not None

    def wait(self) -> Reply:
        """Serve until this message has been served; raises RuntimeError where that is up to other workers."""
        while self.reply is None:
            if not self._center.serve_one(self._center.apply):
                raise RuntimeError("this worker waits for others in its own thread: resume it when the handle is done")
        return self.reply


class LocalWorker(WorkerEnd):
    """A worker's end. Leaving does not wait for the others: they run in this very thread."""

    def __init__(self, center: LocalCenter, worker: int) -> None:
        self._center, self._worker = center, worker

    def exchange(self, commit: Commit, out: Array | None) -> LocalHandle:
        """Queue the commit."""
        handle = LocalHandle(self._center, commit, out)
        self._center.put(handle)
        return handle

    def pull(self, out: Array) -> LocalHandle:
        """Queue a request for the center."""
        return self.exchange(Commit(self._worker, requests=PULL), out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Queue the last commit and the message that it leaves."""
        last = [] if commit is None else [self.exchange(commit, None)]
        return Chained(*last, self.exchange(Commit(self._worker, requests=PULL | LEAVE), out))
