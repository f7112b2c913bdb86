"""The communication thread: the only one that calls MPI while a worker computes.

MPI moves bytes while somebody is inside it. Without this thread that is between two steps alone.
"""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from ..arrays.backend import Array, current, synchronize
from ..core.backoff import set_pace
from ..core.ends import Handle, WorkerEnd
from ..core.leases import Leases
from ..core.messages import Commit, Reply

# Seconds. It does not spin, since the worker needs the GIL, and it sleeps longer than others the longer nothing moves:
# with 5 ms a look of 50 µs takes 1 % of a core.
_CAP, _SPIN = 5e-3, 0.0


class ThreadedHandle(Handle):
    """An exchange of the communication thread."""

    def __init__(self, start: Callable[[], Handle]) -> None:
        self._start, self._done = start, threading.Event()
        self._reply: Reply | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """In the communication thread: start the exchange and finish it."""
        try:
            self._reply = self._start().wait()
        except BaseException as error:  # raised again where the worker waits
            self._error = error
        self._done.set()

    def test(self) -> bool:
        """Whether the exchange is done; raises what has ended it."""
        if self._error is not None:
            raise self._error
        return self._done.is_set()

    def wait(self) -> Reply:
        """Wait for it; may be called again."""
        self._done.wait()
        self.test()
        assert self._reply is not None
        return self._reply


class ThreadedEnd(WorkerEnd):
    """A worker's end whose exchanges run in a thread, one after the other, while the worker computes.

    MPI must be initialized with MPI_THREAD_SERIALIZED, or with MPI_THREAD_MULTIPLE if the caller of the worker uses
    MPI meanwhile. The collective calls come from the caller's thread, when no exchange is under way.

    Args:
        end: what does the exchanges.
        like: a vector where those that are exchanged lie.
    """

    def __init__(self, end: WorkerEnd, like: Array) -> None:
        self.end, self._like, self.forms_deltas = end, like, end.forms_deltas
        self._handles: deque[ThreadedHandle | None] = deque()  # None: end
        self._queued = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As the wrapped end."""
        self.end.begin(total, period, work)

    def exchange(self, commit: Commit, out: Array | None) -> ThreadedHandle:
        """As the wrapped end, in the thread."""
        if commit.payload is not None:
            synchronize(commit.payload)  # the thread may have another stream
        return self._run(partial(self.end.exchange, commit, out))

    def pull(self, out: Array) -> ThreadedHandle:
        """As the wrapped end, in the thread."""
        return self._run(partial(self.end.pull, out))

    def leave(self, commit: Commit | None, out: Array | None) -> ThreadedHandle:
        """As the wrapped end, in the thread."""
        if commit is not None and commit.payload is not None:
            synchronize(commit.payload)
        return self._run(partial(self.end.leave, commit, out))

    @property
    def residual(self) -> Array | None:
        """As of the wrapped end."""
        return self.end.residual

    def restore(self, residual: Array) -> None:
        """As the wrapped end."""
        self.end.restore(residual)

    def close(self) -> None:
        """End the thread, when its exchanges are done, and free what the end holds; collective."""
        self.stop()
        self.end.close()

    def stop(self) -> None:
        """End the thread, when its exchanges are done, and nothing else."""
        if self._thread is not None:
            self._put(None)
            self._thread.join()
            self._thread = None

    def _run(self, start: Callable[[], Handle]) -> ThreadedHandle:
        if self._thread is None:
            # A daemon: a program that ends without closing does not wait for it.
            self._thread = threading.Thread(target=self._serve, name="agnmpi communication", daemon=True)
            self._thread.start()
        handle = ThreadedHandle(start)
        self._put(handle)
        return handle

    def _put(self, handle: ThreadedHandle | None) -> None:
        self._handles.append(handle)
        self._queued.release()

    def _serve(self) -> None:
        set_pace(_CAP, _SPIN)
        with current(self._like):
            while self._queued.acquire() and (handle := self._handles.popleft()):
                handle.run()
