"""Two-sided ends: Isend/Irecv, one round trip per exchange, on any MPI.

A worker sends a header and then its delta, or both in one message if the delta is short, and posts the receives of the
reply. The center polls for headers with one probe, and receives deltas into a few message buffers, whatever the number
of workers. It applies a delta when it has arrived completely, and replies from c in place, block by block following the
apply; while that reply is being sent, the next apply works on a copy (copy on write, in a message buffer).

Requests of deltas and replies are tested one by one: Waitany's order starves high ranks, and Waitall hides which rank
failed.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, to_host
from ..core.backoff import wait_until
from ..core.ends import Chained, Handle, WorkerEnd
from ..core.messages import LEAVE, PULL, SPARE, Commit, Reply, reply_bytes
from .chunks import ALL, INLINE, PIECE, Stream, Ticks
from .peers import CENTER_VARIABLE, DELTA, HEADER, REPLY
from .staging import Direct, Wire, cut

CENTER = 0  # rank
_ASLEEP = 0.02  # seconds between two looks of a spare
# Pieces of a delta on their way at once. With ULFM few: see PIECE. With 4 or 8 of them Open MPI 5.0.11 took 1.25 times
# as long for 24 MB as with 16, and more gave nothing.
IN_FLIGHT = 16


class _Exchange:
    """A worker's exchange under way; `headers`: a pool of buffers for headers of replies."""

    def __init__(
        self, comm: MPI.Comm, wire: Wire, commit: Commit, out: Array | None, headers: list[bytearray],
        header_bytes: int, in_flight: int = IN_FLIGHT,
    ) -> None:  # fmt: skip
        self._wire, self._out, self._headers = wire, out, headers
        self._done: Reply | None = None
        self._pace = (0.0, _ASLEEP) if commit.requests & SPARE else (None, None)  # of waiting
        self._ticks = Ticks()
        self._streams: list[Stream] = []
        payload = commit.payload
        requests, nbytes = commit.requests | (PULL if out is not None else 0), 0 if payload is None else payload.nbytes
        header = commit._replace(requests=requests, nbytes=nbytes).encode()
        if payload is not None and nbytes <= INLINE:
            header, payload = header + to_host(payload).tobytes(), None
        self._requests = [comm.Isend(header, CENTER, HEADER)]
        if payload is not None:
            # A few pieces at a time: the center searches its unexpected messages from all workers for each receive.
            pieces: Iterator[Array] = (piece for chunk in wire.outgoing(payload) for piece in cut(chunk, PIECE))
            post = partial(comm.Isend, dest=CENTER, tag=DELTA)
            self._streams.append(Stream(post, pieces, payload.size, self._ticks, in_flight))
        # The receives are posted after the sends, while these are under way.
        self._header = headers.pop() if headers else bytearray(header_bytes)
        self._requests.append(comm.Irecv(self._header, CENTER, REPLY))
        if out is not None and out.nbytes > INLINE:
            post = partial(comm.Irecv, source=CENTER, tag=CENTER_VARIABLE)
            pieces = cut(wire.incoming(out), PIECE)
            self._streams.append(Stream(post, pieces, out.size, self._ticks, ALL, partial(wire.arrived, out)))

    def test(self) -> bool:
        if self._done is None:
            self._requests = [request for request in self._requests if not request.Test()]
            self._streams = [stream for stream in self._streams if not stream.test()]
            if not self._streams and not self._requests:
                header, out = memoryview(self._header), self._out
                if out is not None and out.nbytes > INLINE:
                    self._wire.settle(out)
                elif out is not None:
                    out[...] = bring(np.frombuffer(header, out.dtype, out.size), out)
                    header = header[out.nbytes :]
                self._done = Reply.decode(header)
                self._headers.append(self._header)
        return self._done is not None

    def _progress(self) -> int:
        return self._ticks.count - len(self._requests)

    def wait(self) -> Reply:
        wait_until(self.test, self._progress, *self._pace)
        assert self._done is not None
        return self._done


class P2PWorker(WorkerEnd):
    """A worker's end: every rank but 0 of `comm`; rank 0, too, where its center says so.

    Args:
        comm: Communicator of the center (rank 0) and its workers, of our own.
        wire: How vectors are handed to MPI; directly by default.
        replicates_state: Whether replies hold the center's state, which grows with the number of workers.
        number: Of this worker; by default one less than its rank.
    """

    def __init__(
        self, comm: MPI.Comm, wire: Wire | None = None, replicates_state: bool = False, number: int | None = None
    ) -> None:
        self._comm, self._worker, self.wire = comm, comm.rank - 1 if number is None else number, wire or Direct()
        self._headers: list[bytearray] = []  # free buffers for headers of replies
        self._header_bytes = INLINE + reply_bytes(comm.size - 1, replicates_state)

    def exchange(self, commit: Commit, out: Array | None) -> _Exchange:
        """Send `commit` and post the receives of its reply."""
        return _Exchange(self._comm, self.wire, commit, out, self._headers, self._header_bytes)

    def pull(self, out: Array) -> _Exchange:
        """Ask for the center."""
        return self.exchange(Commit(self._worker), out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Leave, right after the last commit; the reply comes when all have left."""
        last = []
        if commit is not None:
            # All pieces at once: after a break this rank may block anywhere, and MPI still delivers what is posted.
            last = [_Exchange(self._comm, self.wire, commit, None, self._headers, self._header_bytes, ALL)]
        return Chained(*last, self.exchange(Commit(self._worker, requests=LEAVE), out))
