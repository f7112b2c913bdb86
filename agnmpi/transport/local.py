"""Ends within one process: for one-process runs, for tests of rules, and for virtual time."""

from collections import deque

from ..arrays.backend import Array
from ..core.ends import Apply, CenterEnd, Handle, InTurn, WorkerEnd
from ..core.messages import LEAVE, PULL, Commit, Reply


class LocalCenter(CenterEnd):
    """The center's end: a queue of messages, served in order of arrival.

    `c`: (n,) center variable, moved in place; `apply`: what a worker's `wait` serves with.
    """

    live = progress = 0  # workers that have not left; nothing here takes time

    def __init__(self, c: Array, workers: int, apply: Apply) -> None:
        self._c, self.live = c, workers
        self.apply = apply
        self._workers = workers
        self._queue: deque[LocalHandle] = deque()

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

    def serve_one(self, apply: Apply) -> bool:
        """Serve the oldest message."""
        if not self._queue:
            return False
        handle = self._queue.popleft()
        handle.reply = apply(handle.commit, self.c)
        if handle.commit.requests & LEAVE:
            self.live -= 1
        if handle.out is not None:
            handle.out[...] = self.c
        return True


class LocalHandle:
    """A queued message; waiting for it makes the center serve up to it."""

    def __init__(self, center: LocalCenter, commit: Commit, out: Array | None) -> None:
        self.commit, self.out = commit, out
        self.reply: Reply | None = None
        self._center = center

    def test(self) -> bool:
        """Whether the message has been served."""
        return self.reply is not None

    def wait(self) -> Reply:
        """Serve until this message has been served."""
        while self.reply is None:
            self._center.serve_one(self._center.apply)
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

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """Queue the last commit and the farewell."""
        last = [] if commit is None else [self.exchange(commit, None)]
        return InTurn(*last, self.exchange(Commit(self._worker, requests=PULL | LEAVE), out))
