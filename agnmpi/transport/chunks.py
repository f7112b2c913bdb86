"""Transfers of a vector in pieces, a few at a time."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..core.backoff import wait_until
from .staging import MAX_CALL_BYTES, cut

PIECE = 1 << 20  # bytes; ULFM: large sends under way when a rank dies can hang Open MPI 5.0's btl/tcp
IN_FLIGHT = 4  # pieces
# Bytes: a vector up to this length travels with the header of its commit or reply, a longer one by itself.
INLINE = 4096
ALL = 1 << 60
_STALLED = 0.05  # seconds without a piece


def bcast_in_pieces(comm: MPI.Comm, x: Array, root: int = 0, most: int = MAX_CALL_BYTES) -> None:
    """Copy `x` (n,) of rank `root`, in host memory, into `x` of all ranks of `comm`; collective.

    `most`: bytes of one call; the same on all ranks. Waiting yields the core.
    """
    for piece in cut(x, most):
        wait_until(comm.Ibcast(piece, root).Test)


def share_blocks(comm: MPI.Comm, blocks: Sequence[Array], most: int = MAX_CALL_BYTES) -> None:
    """Copy block i of rank i, in host memory, to all ranks of `comm`; collective.

    All at the same time: each link carries a block once or twice, where a broadcast of the whole leaves by rank 0's.
    """
    requests = [comm.Ibcast(piece, root) for root, block in enumerate(blocks) for piece in cut(block, most)]
    wait_until(lambda: MPI.Request.Testall(requests))


def discarded(nbytes: int) -> Iterator[Array]:
    """Receive buffers for pieces that nobody reads, all in the same memory."""
    scratch = np.empty(min(PIECE, nbytes), np.uint8)
    return (scratch[: min(PIECE, nbytes - at)] for at in range(0, nbytes, PIECE))


class Ticks:
    """Counts messages received and sent: headers, and pieces of vectors."""

    count = 0


class Stream:
    """A transfer of a vector in pieces, `in_flight` at a time.

    Args:
        post: starts one piece.
        pieces: of the vector, in order.
        size: of the vector, in elements.
        ticks: counts the pieces that are done.
        in_flight: most pieces under way.
        done: called with each piece's part of the vector.
        limit: no piece that begins at this element or later may start yet.
    """

    def __init__(
        self,
        post: Callable[[Array], MPI.Request],
        pieces: Iterator[Array],
        size: int,
        ticks: Ticks,
        in_flight: int = IN_FLIGHT,
        done: Callable[[slice], None] = lambda _part: None,
        limit: int = ALL,
    ) -> None:
        self._post, self._pieces, self._size, self._ticks, self._done = post, pieces, size, ticks, done
        self._in_flight, self._at, self._next, self._limit = in_flight, 0, 0, 0  # start of the next to end, to post
        self._requests: deque[tuple[MPI.Request, int]] = deque()
        self._moved = time.perf_counter()
        if limit:
            self.extend(limit)

    def _fill(self) -> None:
        while self._next < self._limit and len(self._requests) < self._in_flight:
            piece = next(self._pieces)
            self._requests.append((self._post(piece), piece.size))
            self._next += piece.size

    def extend(self, limit: int) -> None:
        """Allow the pieces before `limit` to start."""
        self._limit = limit if limit < self._size else self._size
        if self._requests:
            self.test()
        self._fill()

    @property
    def busy(self) -> bool:
        """Whether this stream keeps its link busy: it makes progress, and has pieces that are not posted yet."""
        return self._next < self._size and time.perf_counter() - self._moved < _STALLED

    def test(self) -> bool:
        """Make progress; whether all pieces are done."""
        requests = self._requests
        while requests and requests[0][0].Test():
            _, size = requests.popleft()
            self._done(slice(self._at, self._at + size))
            self._at += size
            self._moved = time.perf_counter()
            self._ticks.count += 1
            if self._next < self._limit:
                self._fill()
        return not requests
