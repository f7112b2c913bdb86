"""Windows: memory at the center, rank 0 of the communicator, for passive-target one-sided calls of every rank.

All windows are locked (shared) throughout: MPICH 5.0.2's Win_lock waits for the target to enter MPI even in
shared memory (2 ms for a center that sleeps for 2 ms, 3 s for one that sleeps for 3 s), and both MPIs spin in it. Whole
pulls use a lock of our own, a word of the control window.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..core.backoff import Backoff, wait_until
from ..core.ends import CenterEnd, WorkerEnd
from ..core.messages import COMMIT_BYTES, Reply
from ..version import mpi_library
from .agreement import ConfigError, allgather, equal_on_all, require_equal, require_equal_total
from .staging import MAX_CALL_BYTES, Direct, Wire, cut

CENTER = 0  # rank
_PAGE = 4096
_AWAY = (0.002, 0.004, 0.008, 0.016, 0.02)  # seconds out of MPI, in turn: a busy machine may be late once or twice

# Words (int64) of the control window: COUNTS of them that all read together; then for each worker the number of its
# last posted message, and, adjacent, the number of its last served message and how far c is done; then the headers.
READERS, CLOCK, STEPS, LEFT, NEXT, STALENESS, STALEST, CONTROL, CHECKPOINT, REFUSALS, GIVEN_UP = range(11)
LOSS, LOSSES, COUNTS = range(11, 14)
COMMIT_WORDS, REPLY_WORDS = COMMIT_BYTES // 8, len(Reply(0).encode()) // 8


class ControlWord:
    """One word of the control window, for a readers' lock."""

    def __init__(self, windows: "Windows", word: int) -> None:
        self._windows, self._word = windows, word

    def add(self, value: int) -> int:
        """Add `value` atomically, and return the old value."""
        return self._windows.add(self._word, value)

    def read(self) -> int:
        """The word, read atomically."""
        return self._windows.read(self._word)


class Windows:
    """The windows at the center; collective over `comm`.

    Args:
        comm: the center is its rank 0.
        like: a vector like c (n,).
        slots: vectors beside c.
        most: bytes per MPI call.
        inline: bytes of a vector that are written behind each header and each reply.
        slot_bytes: of each slot; None: of a vector.
        encoded_bytes: of c as it is pulled, behind c.
        trains: whether rank 0 is a worker, too.

    Raises:
        ConfigError: on all ranks, if it does not fit.
    """

    def __init__(
        self, comm: MPI.Comm, like: Array, slots: int, most: int = MAX_CALL_BYTES, inline: int = 0,
        slot_bytes: int | None = None, encoded_bytes: int = 0, trains: bool = False,
    ) -> None:  # fmt: skip
        require_equal(comm, {"size of the vector": str(like.size), "dtype": str(like.dtype)})
        self.comm, self.dtype, self.size, self.workers = comm, like.dtype, like.size, comm.size - (not trains)
        self.slot_bytes = like.nbytes if slot_bytes is None else slot_bytes
        self.stride, self.slot_stride = _whole_pages(like.nbytes), _whole_pages(self.slot_bytes)
        self._most, workers = most, self.workers
        self.posted = COUNTS  # first word of the numbers of posted messages
        self.headers = self.posted + 3 * workers
        self.inline = -(-inline // 8)  # words
        self.replies = self.headers + (COMMIT_WORDS + self.inline) * workers
        nbytes = self.stride + _whole_pages(encoded_bytes)
        sizes = nbytes, slots * self.slot_stride, 8 * (self.replies + (REPLY_WORDS + self.inline) * workers)
        _check_room(comm, sum(sizes))
        is_center = comm.rank == CENTER
        # Win.Allocate, not Win.Create: on one node both MPIs then use shared memory.
        self._all = [
            MPI.Win.Allocate(size if is_center else 0, 1, MPI.INFO_NULL, comm)  # type: ignore[arg-type]
            for size in sizes
        ]
        self.center, self.slots, self.control = self._all
        if is_center:
            _reserve(self._all)
        self.words = np.asarray(self.control.tomemory()).view(np.int64) if is_center else np.empty(0, np.int64)
        self.words[:] = 0
        self._one, self._old = np.empty(1, np.int64), np.empty(1, np.int64)
        self._zeros = np.zeros(max(2, workers), np.int64)
        for win in self._all:
            win.Lock_all(MPI.MODE_NOCHECK)
            win.Sync()
        self.one_host = equal_on_all(comm, MPI.Get_processor_name())
        self.shared = self.one_host and (comm.size == 1 or self._reach_an_absent_center())
        wait_until(comm.Ibarrier().Test)

    def begin(self, total: int | None, between: Callable[[], object] = bool) -> None:
        """Begin a session of `total` steps; collective. `between` is called when none reads c, or adds to it."""
        require_equal_total(self.comm, total)
        between()
        wait_until(self.comm.Ibarrier().Test)

    def _reach_an_absent_center(self) -> bool:
        """Whether what the first worker writes is seen at the center while that does not enter MPI; collective.

        It is not where windows are no shared memory, as with MPICH 4.0 of Debian, or Intel MPI's I_MPI_FABRICS=ofi.
        """
        written, seen = self.words[self.posted : self.posted + 2], np.zeros(1, np.int64)
        for seconds in _AWAY:
            wait_until(self.comm.Ibarrier().Test)
            if self.comm.rank == 1:
                self.put(self.posted, b"\1" * 8)
                self.add(self.posted + 1, 1)
            back = time.monotonic() + seconds
            while self.comm.rank == CENTER and not (seen[0] or time.monotonic() > back):
                time.sleep(1e-4)
                seen[0] = written.all()
            wait_until(self.comm.Iallreduce(MPI.IN_PLACE, seen, MPI.MAX).Test)  # all have written
            written[:] = 0
            self.control.Sync()
            if seen[0]:
                return True
        return False

    @property
    def caveat(self) -> str:
        """What a user should know of windows here; empty if they are what they should be."""
        if not self.one_host:
            return ""
        if self.shared:
            return _detour(mpi_library(), os.environ)
        return (
            f"windows of {mpi_library()} are no shared memory on this host: what a worker writes waits until rank 0 "
            "enters MPI; transport p2p is faster here"
        )

    def served(self, worker: int) -> int:
        """First of two words: the number of a worker's last served message, and up to where c is done for it."""
        return self.posted + self.workers + 2 * worker

    def header(self, worker: int) -> int:
        """First word of the header of a worker's message."""
        return self.headers + (COMMIT_WORDS + self.inline) * worker

    def reply(self, worker: int) -> int:
        """First word of the answer to a worker."""
        return self.replies + (REPLY_WORDS + self.inline) * worker

    def vector(self) -> Array:
        """c, at the center."""
        return self.bytes_of(self.center, 0, self.size * self.dtype.itemsize).view(self.dtype)

    def bytes_of(self, win: MPI.Win, offset: int, count: int) -> Array:
        """`count` bytes of `win` from `offset` on, at the center."""
        memory: Array = np.asarray(win.tomemory()).view(np.uint8)[offset:][:count]
        return memory

    def add(self, word: int, value: int, op: MPI.Op = MPI.SUM) -> int:
        """Change a word of the control window atomically (`op`: SUM, MAX, REPLACE, NO_OP), and return the old value."""
        self._one[0] = value
        # No type is named: numpy's int64 travels as MPI_LONG, and MPICH refuses to mix it with MPI_INT64_T.
        self.control.Fetch_and_op(self._one, self._old, CENTER, 8 * word, op)
        self.control.Flush(CENTER)
        return int(self._old[0])

    def sum(self, word: int, values: Array) -> None:
        """Add `values` to words; not to be changed before the next `add` or `get`: across hosts they are sent then."""
        self.control.Accumulate(values, CENTER, 8 * word, MPI.SUM)

    def read(self, word: int) -> int:
        """A word of the control window, read atomically."""
        return self.add(word, 0, MPI.NO_OP)

    def read_each(self, word: int, count: int) -> Array:
        """`count` words, each read atomically."""
        out = np.empty(count, np.int64)
        self.control.Get_accumulate(self._zeros[:count], out, CENTER, 8 * word, MPI.NO_OP)
        self.control.Flush(CENTER)
        return out

    def get(self, word: int, count: int) -> Array:
        """`count` words that no rank is changing."""
        out = np.empty(count, np.int64)
        self.control.Get(out, CENTER, 8 * word)
        self.control.Flush(CENTER)
        return out

    def put(self, word: int, values: bytes) -> None:
        """Write words that no rank is reading."""
        self.control.Put(np.frombuffer(values, np.uint8), CENTER, 8 * word)
        self.control.Flush(CENTER)

    def sync(self) -> None:
        """Make others' writes visible to this process, and its writes to them."""
        for win in self._all:
            win.Sync()

    def pull(self, wire: Wire, out: Array, done: Callable[[], int] | None = None, offset: int = 0) -> None:
        """Get c, or what lies at byte `offset`, into `out`, piece by piece, so that a copy to the device overlaps.

        `done()`: number of elements of c that may be read so far, where that is not all; it grows to all.
        """
        buffer, backoff, at = wire.incoming(out), Backoff(), 0
        itemsize = out.dtype.itemsize
        most = max(1, self._most // itemsize)
        for part in wire.cuts(out):
            while at < part.stop:
                stop = min(done() if done else part.stop, part.stop, at + most)
                if stop <= at:
                    backoff.wait()
                    continue
                self.center.Get(buffer[at:stop], CENTER, offset + at * itemsize)
                self.center.Flush(CENTER)
                backoff.reset()
                at = stop
            wire.arrived(out, part)
        wire.settle(out)

    def push(self, wire: Wire, x: Array, send: Callable[[Array, int], None], win: MPI.Win, offset: int = 0) -> None:
        """Send `x` piece by piece to byte `offset` of `win` by `send(piece, byte)`."""
        for chunk in wire.outgoing(x):
            for piece in cut(chunk, self._most):
                send(piece, offset)
                offset += piece.nbytes
        win.Flush(CENTER)

    def free(self) -> None:
        """Unlock and free; collective."""
        wait_until(self.comm.Ibarrier().Test)
        for win in self._all:
            win.Unlock_all()
        self.words = self.words[:0]
        for win in self._all:
            win.Free()


class WindowsWorker(WorkerEnd):
    """Base of the workers' ends over windows; every rank but 0 of the windows' communicator, or with a `number` all."""

    def __init__(self, windows: Windows, wire: Wire | None, number: int | None = None) -> None:
        self.worker = windows.comm.rank - 1 if number is None else number
        self.windows, self.wire = windows, wire or Direct()

    def close(self) -> None:
        """Free the windows; collective."""
        self.windows.free()


class WindowsCenter(CenterEnd):
    """Base of the center's ends over windows; rank 0 of the windows' communicator.

    `c`: (n,) center variable in host memory, copied into the window.
    """

    progress = 0  # changes while anything is under way

    def __init__(self, windows: Windows, c: Array) -> None:
        self.windows = windows
        self._c = windows.vector()
        self._c[...] = c

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._c

    @property
    def caveat(self) -> str:
        """Of the windows."""
        return self.windows.caveat

    def close(self) -> None:
        """Free the windows; collective. c is copied to memory of its own."""
        self._c = self._c.copy()
        self.windows.free()


def _detour(library: str, environment: Mapping[str, str]) -> str:
    """What to set where Open MPI 4 prefers osc/rdma to osc/sm, shared memory by loads and stores; empty elsewhere.

    >>> _detour("Open MPI v4.1.4", {})
    'windows of Open MPI v4.1.4 take a detour (osc/rdma): OMPI_MCA_osc_rdma_priority=99 makes them several times faster'
    >>> _detour("Open MPI v4.1.4", {"OMPI_MCA_osc_rdma_priority": "99"}), _detour("Open MPI v5.0.11", {})
    ('', '')
    """
    name = "OMPI_MCA_osc_rdma_priority"
    if not library.startswith("Open MPI v4") or name in environment or environment.get("OMPI_MCA_osc") == "sm":
        return ""
    return f"windows of {library} take a detour (osc/rdma): {name}=99 makes them several times faster"


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _reserve(wins: list[MPI.Win]) -> None:
    """Touch every page: shared memory is committed when first written, not when allocated.

    So the next check, by another center on this host or another job, sees what is left. The centers of one host do this
    one after the other without communication: every worker creates its windows with one center after the other.
    """
    for win in wins:
        np.asarray(win.tomemory())[::_PAGE] = 0


def _check_room(comm: MPI.Comm, nbytes: int) -> None:
    """Refuse windows that do not fit into shared memory: the first write beyond it would be a SIGBUS."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if comm.rank == CENTER and shared.is_dir() else nbytes
    free = int(allgather(comm, str(free))[CENTER])
    if free < nbytes:
        raise ConfigError(
            f"the windows of the center need {nbytes >> 20} MiB of shared memory, but {shared} on the host of rank 0 "
            f"has {free >> 20} MiB free: enlarge it (docker run --shm-size, mount -o remount,size=…), use fewer "
            "workers, or transport p2p"
        )
