"""Fake workers: a communicator for a center end that needs no ranks, and counts the calls to it.

A worker's messages are put into `headers`; its delta arrives and sends to it complete immediately, unless it is
`hanging`.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from ..core.messages import Commit
from ..transport.peers import CENTER_VARIABLE, DELTA, HEADER, REPLY

_NAMES = {HEADER: "header", DELTA: "delta", REPLY: "reply", CENTER_VARIABLE: "center variable"}


class Request:
    """A request that is done when `attempt` returns true."""

    def __init__(self, peers: "FakePeers", attempt: Callable[[], bool]) -> None:
        self._peers, self._attempt, self._done = peers, attempt, False

    def Test(self) -> bool:
        """Whether it is done."""
        self._peers.calls["Test"] += 1
        self._done = self._done or self._attempt()
        return self._done


class Message:
    """A header that has been matched."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def Recv(self, buffer: bytearray) -> None:
        """Receive it."""
        buffer[: len(self._header)] = self._header


class Group:
    """Some ranks."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks, self.size = ranks, len(ranks)

    def Translate_ranks(self, ranks: list[int], _group: "Group") -> list[int]:
        """The ranks in the whole world."""
        return [self.ranks[rank] for rank in ranks]

    def Free(self) -> None:
        """Nothing to free."""


class FakePeers:
    """The communicator of a center with `workers` workers.

    Attributes:
        headers: (worker, header) of the messages that were sent and that the center has not received.
        hanging: Workers that neither send the rest of a delta nor receive replies.
        dying: Workers whose requests fail, as with ULFM.
        acknowledged: Those of them that the probe no longer reports.
        calls: Calls of each kind so far.
        nbytes: Bytes sent to workers so far, by kind.
        sent: The last reply's header to each worker.
    """

    rank = 0

    def __init__(self, workers: int) -> None:
        self.size = workers + 1
        self.headers: deque[tuple[int, bytes]] = deque()
        self.hanging, self.dying, self.acknowledged = set[int](), set[int](), set[int]()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.sent: dict[int, bytes] = {}

    def send(self, commit: Commit, nbytes: int = 0, inline: bytes = b"") -> None:
        """Send a message as a worker would: it announces `nbytes` of payload; `inline` follows the header at once."""
        self.headers.append((commit.worker, commit._replace(nbytes=nbytes).encode() + inline))

    def Improbe(self, _source: int, _tag: int, status: MPI.Status) -> Message | None:
        """Match a header."""
        self.calls["Improbe"] += 1
        if self.dying - self.acknowledged:
            raise MPI.Exception(MPI.ERR_PROC_FAILED)
        if not self.headers:
            return None
        worker, header = self.headers.popleft()
        status.Set_source(worker + 1)
        status.Set_elements(MPI.BYTE, len(header))
        return Message(header)

    def Irecv(self, buffer: Any, source: int, tag: int) -> Request:
        """Post the receive of a piece of a delta, which is all ones."""
        assert tag == DELTA
        self.calls["Irecv"] += 1
        return Request(self, lambda: self._arrives(source - 1, buffer))

    def Isend(self, buffer: Any, dest: int, tag: int) -> Request:
        """Send a reply, or a piece of c."""
        self.calls["Isend"] += 1
        self.nbytes[_NAMES[tag]] += memoryview(buffer).nbytes
        if tag == REPLY:
            self.sent[dest - 1] = bytes(buffer)
        return Request(self, lambda: self._answers(dest - 1))

    def Get_failed(self) -> Group:
        """The dead (ULFM)."""
        return Group([worker + 1 for worker in sorted(self.dying)])

    def Get_group(self) -> Group:
        """All ranks."""
        return Group(list(range(self.size)))

    def Ack_failed(self, count: int) -> None:
        """Report these deaths no more (ULFM)."""
        self.acknowledged = set(sorted(self.dying)[:count])

    def _answers(self, worker: int) -> bool:
        if worker in self.dying:
            raise MPI.Exception(MPI.ERR_PROC_FAILED)
        return worker not in self.hanging

    def _arrives(self, worker: int, buffer: Any) -> bool:
        if not self._answers(worker):
            return False
        buffer[:] = np.ones((), buffer.dtype)
        return True
