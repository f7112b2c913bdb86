"""The one-sided mailbox: any rule, any center optimizer, whole pulls.

A worker puts its delta into its own slot and raises a counter; the center applies slot by slot, and the worker
gets c: on one machine behind the apply, block by block.
"""

import time
from functools import partial

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..core.ends import Apply, CenterEnd, Handle, Polled, WorkerEnd
from ..core.messages import LEAVE, MISFIT, PULL, Commit, Reply
from .staging import Direct, Wire
from .windows import APPLIED, CENTER, CLOCK, COMMIT_WORDS, LEFT, READERS, REPLY_WORDS, STEPS, WAITING, WRITING, Windows

_PIECE = 1 << 20  # bytes of c that are read at once behind the apply


class RMAWorker(WorkerEnd):
    """A worker's end of the mailbox: every rank but 0 of `comm`. `like`: a vector like x (n,).

    Starting an exchange, and the pull at its end, block for as long as their bytes are on the way. Who waits, instead
    of testing, may stay with an apply until that ends, and is let in before the next.
    """

    def __init__(self, comm: MPI.Comm, like: Array, wire: Wire | None = None) -> None:
        self.worker, self.wire = comm.rank - 1, wire or Direct()
        self.windows = Windows(comm, like, comm.size - 1)
        self._posted = 0  # odd while a message is being put, even when it is whole
        self._kept_out = False  # c was changing
        self._waits = 0  # what tells the center so

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Put `commit` into this worker's slot, which is free: one exchange at a time."""
        windows, payload = self.windows, commit.payload
        if payload is not None and payload.size != windows.size:
            raise ValueError(f"worker {self.worker}: a vector of {payload.size} numbers, not {windows.size}")
        requests = commit.requests | (PULL if out is not None else 0)
        commit = commit._replace(requests=requests, nbytes=0 if payload is None else payload.nbytes)
        windows.put(windows.header(self.worker), commit.encode())
        if payload is not None:
            if not windows.one_host:
                # Odd: the center stays awake while bytes are coming, which need it inside MPI.
                windows.add(windows.posted + self.worker, self._posted + 1, MPI.REPLACE)
            slots = windows.slots
            windows.push(
                self.wire,
                payload,
                lambda piece, at: slots.Put(piece, CENTER, at),
                slots,
                self.worker * windows.stride,
            )
        self._posted += 2
        windows.add(windows.posted + self.worker, self._posted, MPI.REPLACE)
        return Polled(partial(self._answered, self._posted, out, bool(commit.requests & LEAVE)))

    def _answered(self, posted: int, out: Array | None, leaving: bool, patient: bool) -> Reply | None:
        """The reply to the message `posted`, with c in `out`, as soon as it has been taken and c can be read."""
        windows = self.windows
        taken, done = windows.look(windows.taken(self.worker), 2).tolist()
        if taken != posted:
            return self._follow(posted, out) if done and patient and out is not None else None
        pulled = self._answer() if out is None else self.try_pull(out, self._answer(), patient)
        if leaving and pulled is not None:
            windows.add(LEFT, 1)  # the next session may begin: the final center has been read
        return pulled

    def _follow(self, posted: int, out: Array) -> Reply | None:
        """Get c behind the apply of the message `posted`; None if that has ended before we are counted as a reader."""
        windows, word = self.windows, self.windows.taken(self.worker)
        windows.add(READERS, 1)
        if not windows.read(word + 1):
            windows.add(READERS, -1)
            return None
        # The center was still at it after we came in: it finds us when it wants to change c the next time, and waits.

        def readable() -> int:
            taken, done = windows.look(word, 2).tolist()
            return out.size if taken == posted else int(done)

        windows.pull(self.wire, out, readable)  # its last piece comes when the message is taken
        reply = self._of_now(self._answer())
        windows.add(READERS, -1)
        return reply

    def _answer(self) -> Reply:
        windows = self.windows
        return Reply.decode(windows.get(windows.reply(self.worker), REPLY_WORDS).tobytes())

    def _of_now(self, reply: Reply) -> Reply:
        """`reply` with what belongs to c, which keeps still."""
        head = self.windows.get(0, APPLIED + self.windows.workers).tolist()
        return reply._replace(clock=head[CLOCK], steps=head[STEPS], applied=tuple(head[APPLIED:]))

    def pull(self, out: Array) -> Handle:
        """Get the center; needs nothing of the center rank but that it be in MPI now and then across hosts."""
        return Polled(partial(self.try_pull, out, Reply(0)))

    def try_pull(self, out: Array, reply: Reply, patient: bool) -> Reply | None:
        """Get c as one whole, unless it changes just now; returns `reply` with what belongs to c."""
        windows = self.windows
        if self._kept_out and windows.read(READERS) >= WRITING:
            return None  # without disturbing the center again, which waits for the readers to go
        self._kept_out = windows.add(READERS, 1 - self._waits) >= WRITING
        if self._kept_out:
            self._waits = WAITING if patient else self._waits
            windows.add(READERS, self._waits - 1)
            return None
        self._waits = 0
        reply = self._of_now(reply)
        windows.pull(self.wire, out)  # last: a long vector leaves nothing else in the cache
        windows.add(READERS, -1)
        return reply

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """Put the last commit and the farewell as one message; it is taken when all have left."""
        last = commit or Commit(self.worker)
        return self.exchange(last._replace(requests=last.requests | LEAVE), out)

    def close(self) -> None:
        """Free the windows; collective."""
        self.windows.free()


class RMACenter(CenterEnd):
    """The center's end of the mailbox: rank 0 of `comm`; memory: c and a slot for each worker.

    `c`: (n,) center variable in host memory, copied into the window. Slots are served round robin.
    """

    progress = 0  # changes while anything is under way

    def __init__(self, comm: MPI.Comm, c: Array) -> None:
        self._comm, self._workers = comm, comm.size - 1
        self._windows = windows = Windows(comm, c, self._workers)
        self._c = windows.vector(windows.center)
        self._c[...] = c
        self._slots = [windows.vector(windows.slots, worker) for worker in range(self._workers)]
        self._taken = np.zeros(self._workers, np.int64)  # posted messages that have been served
        self._turn, self._locked = 0, False
        self.courtesy = 2e-3  # seconds for which the next apply waits for pulls that the last one kept out
        self._open_until = 0.0
        self._readable = 0  # up to where c may be read behind the apply
        self._applied: Commit | None = None  # while it is, if its worker may read behind
        self._left: list[int] = []
        self._sessions = self._gone = 0  # farewells of all sessions that are over for their workers, too

    @property
    def c(self) -> Array:
        """(n,) the center variable."""
        return self._c

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return self._sessions * self._workers - self._gone

    def open(self) -> None:
        """Begin a session."""
        self._left.clear()
        self._sessions += 1

    def serve_one(self, apply: Apply) -> bool:
        """Serve the next worker, in turn, whose message is whole."""
        windows = self._windows
        self._comm.Iprobe()  # progress for what comes from other hosts
        if len(self._left) == self._workers:
            self._gone = windows.read(LEFT)
            return False
        posted = windows.look(windows.posted, self._workers)
        if not windows.one_host and ((posted % 2).any() or windows.read(READERS) % WRITING):
            self.progress += 1
        for i in range(self._workers):
            worker = (self._turn + i) % self._workers
            if posted[worker] != self._taken[worker] and not posted[worker] % 2:
                self._turn = worker  # until it is served: readers of c may have to finish first
                if not self._serve(worker, int(posted[worker]), apply):
                    return False
                self._turn = worker + 1
                return True
        return False

    def _serve(self, worker: int, posted: int, apply: Apply) -> bool:
        windows = self._windows
        windows.sync()
        header = windows.words[windows.header(worker) :][:COMMIT_WORDS].tobytes()
        commit = Commit.decode(header).taken_from(worker, self._c.nbytes)
        if commit.nbytes and not commit.flags & MISFIT:
            if not self._lock():
                return False
            commit = commit._replace(payload=self._slots[worker])
        if windows.one_host and commit.requests & (PULL | LEAVE) == PULL:
            self._applied = commit
        reply = apply(commit, self._c)
        self._applied = None
        if self._readable:
            self._readable = 0
            windows.add(windows.taken(worker) + 1, 0, MPI.REPLACE)  # while new readers are still kept out
        self._taken[worker] = posted
        if commit.requests & LEAVE:
            self._left.append(worker)
            answered = self._left if len(self._left) == self._workers else []
        else:
            answered = [worker]
        words, answer = windows.words, np.frombuffer(reply._replace(applied=()).encode(), np.int64)
        words[CLOCK], words[STEPS] = reply.clock, reply.steps
        words[APPLIED:][: len(reply.applied)] = reply.applied
        for waiting in answered:
            words[windows.reply(waiting) :][:REPLY_WORDS] = answer
        windows.sync()
        if self._locked:
            kept_out = windows.add(READERS, -WRITING) - WRITING >= WAITING
            self._open_until = time.perf_counter() + self.courtesy if kept_out else 0.0
            self._locked = False
        for waiting in answered:
            windows.add(windows.taken(waiting), int(self._taken[waiting]), MPI.REPLACE)
        return True

    def move_on(self, stop: int) -> None:
        """While a commit is applied, and c is done up to `stop`: let its worker read that."""
        windows = self._windows
        if self._applied and (stop - self._readable) * self._c.itemsize >= _PIECE and stop < self._c.size:
            self._readable = stop
            windows.sync()
            windows.add(windows.taken(self._applied.worker) + 1, stop, MPI.REPLACE)

    def _lock(self) -> bool:
        """Keep new readers of c out; whether those within have finished.

        Behind the apply workers read in any case; those who came too late for theirs, or only pull, would find c
        changing ever again at a busy center.
        """
        windows = self._windows
        if self._locked:
            return windows.read(READERS) % WAITING == 0
        if time.perf_counter() < self._open_until and windows.read(READERS) >= WAITING:
            return False
        self._locked = True
        return windows.add(READERS, WRITING) % WAITING == 0

    def close(self) -> None:
        """Free the windows; collective. c lives on in memory of its own."""
        self._c = self._c.copy()
        self._slots.clear()
        self._windows.free()
