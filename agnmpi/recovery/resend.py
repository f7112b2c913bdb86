"""A worker's end that repeats an exchange with another center where the current one is lost (ULFM)."""

from collections.abc import Callable
from typing import TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array, empty_like
from ..core.ends import Elected, Handle, WorkerEnd
from ..core.leases import Leases
from ..core.messages import Commit, Reply
from ..core.worker import Worker
from ..transport.communication_thread import ThreadedEnd
from ..transport.peers import peer_failed

Begin: TypeAlias = Callable[[WorkerEnd, Array | None], Handle]


class ResendingEnd(WorkerEnd):
    """A worker's end that outlives a center; its handles may raise Elected.

    Args:
        end: to the current center.
        worker: whose index goes into each commit; it changes with the center.
        center_lost: finds another center; True if this rank was elected to serve.
    """

    def __init__(self, end: WorkerEnd, worker: Worker, center_lost: Callable[[], bool]) -> None:
        self.end, self.center_lost = end, center_lost
        self.sending: Commit | None = None  # of the exchange under way
        self._worker = worker
        self._kept: list[object] = []  # exchanges with dead centers: MPI may still access their memory

    def replace(self, end: WorkerEnd) -> None:
        """Use another center from now on; nothing is under way with the last one."""
        if isinstance(self.end, ThreadedEnd):
            self.end.stop()
        self.end = end

    def keep(self, handle: object) -> None:
        """Keep the memory of an exchange with a dead center alive."""
        self._kept.append(handle)

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As the wrapped end."""
        self.end.begin(total, period, work)

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """As the wrapped end."""
        return _ResendingHandle(self, lambda end, into: end.exchange(self._with_index(commit), into), out, commit)

    def pull(self, out: Array) -> Handle:
        """As the wrapped end."""
        return _ResendingHandle(self, lambda end, into: end.pull(out if into is None else into), out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """As the wrapped end."""

        def begin(end: WorkerEnd, into: Array | None) -> Handle:
            return end.leave(None if commit is None else self._with_index(commit), into)

        return _ResendingHandle(self, begin, out, commit)

    @property
    def residual(self) -> Array | None:
        """As of the wrapped end."""
        return self.end.residual

    def restore(self, residual: Array) -> None:
        """As the wrapped end."""
        self.end.restore(residual)

    def close(self) -> None:
        """As the wrapped end."""
        self.end.close()

    def _with_index(self, commit: Commit) -> Commit:
        """The commit with this worker's index at the current center."""
        return commit._replace(worker=self._worker.index)


class _ResendingHandle(Handle):
    """An exchange that is repeated if the center is lost."""

    def __init__(self, end: ResendingEnd, begin: Begin, out: Array | None, commit: Commit | None = None) -> None:
        self._end, self._begin, self._out, self._into = end, begin, out, out
        self._handle: Handle | None = None
        self._reply: Reply | None = None
        end.sending = commit
        self._start()

    def test(self) -> bool:
        """Make progress; whether the exchange is done. May raise Elected."""
        return self._attempt(lambda handle: handle.test())

    def wait(self) -> Reply:
        """Finish the exchange. May raise Elected."""
        while not self._attempt(lambda handle: bool(handle.wait())):
            pass
        assert self._reply is not None
        return self._reply

    def _start(self) -> None:
        while self._handle is None:
            try:
                self._handle = self._begin(self._end.end, self._into)
            except MPI.Exception as error:
                self._lost(error)

    def _lost(self, error: MPI.Exception) -> None:
        if not peer_failed(error):
            raise error
        self._end.keep((self._handle, self._into))
        self._handle = None
        before = self._end.end
        if self._end.center_lost():
            raise Elected
        if self._end.end is before:  # the center is alive: another peer was lost
            raise error
        if self._out is not None:
            self._into = empty_like(self._out)  # messages of the dead center may still arrive in the other

    def _attempt(self, finished: Callable[[Handle], bool]) -> bool:
        """Whether the exchange is done, by `finished`."""
        if self._reply is None:
            assert self._handle is not None
            try:
                if not finished(self._handle):
                    return False
            except MPI.Exception as error:
                self._lost(error)
                self._start()
                return False
            self._reply, self._end.sending = self._handle.wait(), None
            if self._out is not None and self._into is not self._out:
                self._out[...] = self._into
        return True
