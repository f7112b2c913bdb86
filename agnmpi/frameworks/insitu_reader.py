"""A rank that reads a run in situ: it pulls the center, and commits nothing."""

import numpy as np

from ..arrays.backend import Array
from ..core.ends import Handle, WorkerEnd
from ..core.messages import STOP, Reply


class Reader:
    """Pulls when told, and never waits.

    Args:
        end: its end.
        x: (n,) like the center.

    >>> from agnmpi.core import rules
    >>> from agnmpi.core.center import Center
    >>> from agnmpi.transport.local import LocalCenter
    >>> center = Center(rules.agn(), np.zeros(1), workers=1)
    >>> local = LocalCenter(np.ones(1), 2, center.apply)
    >>> reader = Reader(local.worker_end(1), np.zeros(1))
    >>> reader.poll()  # the center has not answered yet
    False
    >>> local.serve_one(center.apply), reader.poll(), reader.o
    (True, True, array([1.]))
    """

    def __init__(self, end: WorkerEnd, x: Array) -> None:
        self.o = x.copy()  # the center, as it was pulled last
        self.last_reply: Reply | None = None
        self.left = False  # all workers have left, and it has the final center
        self._end, self._arriving, self._leaving = end, np.empty_like(x), False
        self._handle: Handle | None = end.pull(self._arriving)

    @property
    def done(self) -> bool:
        """Whether nobody trains any more, as of the last pull."""
        return self.last_reply is not None and self.last_reply.control == STOP

    def pull(self) -> None:
        """Ask for the center, unless a pull is under way."""
        if self._handle is None and not self.left:
            self._handle = self._end.pull(self._arriving)

    def poll(self) -> bool:
        """Make progress without blocking; whether a center has arrived."""
        if self._handle is None or not self._handle.test():
            return False
        self.last_reply, self._handle = self._handle.wait(), None
        self.o, self._arriving = self._arriving, self.o
        if self._leaving:
            self.left = True
        return True

    def leave(self) -> None:
        """Leave, once no pull is under way: to be called until it has `left`."""
        self.poll()
        if self._handle is None and not self._leaving:
            self._leaving, self._handle = True, self._end.leave(None, self._arriving)
