"""The one-sided mailbox: any rule, any center optimizer, whole pulls.

A worker puts its delta into its own slot and increments a counter; the center applies slot by slot, and the worker
gets c: on one machine block by block, following the apply. Where pulls are encoded, the center writes c in its encoding
behind c, once for each clock, and workers get that.
"""

from collections import deque
from functools import partial

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, bring, to_host
from ..arrays.encodings import Encoding, encode_pull, get, sizes
from ..core.backoff import wait_until
from ..core.ends import Apply, Handle, Polled
from ..core.messages import COMMIT_BYTES, ENCODED, LEAVE, MISFIT, PULL, Commit, Reply
from .chunks import INLINE
from .readers_lock import ReadersLock
from .staging import MAX_CALL_BYTES, Wire
from .windows import (
    CENTER,
    CLOCK,
    COMMIT_WORDS,
    COUNTS,
    LEFT,
    READERS,
    REPLY_WORDS,
    STEPS,
    ControlWord,
    Windows,
    WindowsCenter,
    WindowsWorker,
)

_PIECE = 1 << 20  # bytes of c per Get that follows the apply


class RMAWorker(WindowsWorker):
    """A worker's end of the mailbox: every rank but 0 of `comm`.

    `like`: a vector like x (n,); `most`: bytes per MPI call; `encoding`: of deltas, for which slots have room;
    `pull_encoding`: of pulls.

    Starting an exchange, and the pull at its end, block for as long as their transfer takes. `wait`, unlike `test`, may
    follow an apply until it ends, and reads before the next one.
    """

    def __init__(
        self, comm: MPI.Comm, like: Array, wire: Wire | None = None, most: int = MAX_CALL_BYTES,
        encoding: str = "float32", pull_encoding: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__(_windows(comm, like, most, encoding, pull_encoding), wire)
        self.lock = ReadersLock(ControlWord(self.windows, READERS))
        self._posted = 0  # odd while a message is being put, even when it is complete

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Put `commit` into this worker's slot, which is free: one exchange at a time."""
        windows, payload = self.windows, commit.payload
        if payload is not None and not commit.encoding and payload.size != windows.size:
            raise ValueError(f"worker {self.worker}: a vector of {payload.size} numbers, not {windows.size}")
        if payload is not None and payload.nbytes > windows.slot_bytes:
            raise ValueError(
                f"worker {self.worker}: a delta of {payload.nbytes} bytes, but its slot has {windows.slot_bytes}: "
                "encode it as the transport says"
            )
        requests = commit.requests | (PULL if out is not None else 0)
        commit = commit._replace(requests=requests, nbytes=0 if payload is None else payload.nbytes)
        inline = to_host(payload).tobytes() if payload is not None and windows.inline else b""
        windows.put(windows.header(self.worker), commit.encode().ljust(COMMIT_BYTES, b"\0") + inline)
        if payload is not None and not inline:
            if not windows.shared:
                # Odd: the center stays awake while a transfer needs progress by it.
                windows.add(windows.posted + self.worker, self._posted + 1, MPI.REPLACE)
            slots = windows.slots
            windows.push(
                self.wire,
                payload,
                lambda piece, at: slots.Put(piece, CENTER, at),
                slots,
                self.worker * windows.slot_stride,
            )
        self._posted += 2
        windows.add(windows.posted + self.worker, self._posted, MPI.REPLACE)
        return Polled(partial(self._answered, self._posted, out, requests))

    def _answered(self, posted: int, out: Array | None, requests: int, blocking: bool) -> Reply | None:
        """The reply to the message `posted`, with c in `out`, as soon as that is served and c can be read."""
        windows = self.windows
        served, done = windows.read_each(windows.served(self.worker), 2).tolist()
        if served != posted:
            return self._follow(posted, out) if done and blocking and out is not None else None
        if out is None:
            pulled: Reply | None = self._answer()
        elif windows.inline:
            pulled = self._answer_with(out)
        else:
            pulled = self.try_pull(out, self._answer(), blocking, windows.stride if requests & ENCODED else 0)
        if requests & LEAVE and pulled is not None:
            windows.add(LEFT, 1)  # the next session may change c
        return pulled

    def _follow(self, posted: int, out: Array) -> Reply | None:
        """Get c following the apply of the message `posted`; None if that ended before we were counted as a reader."""
        windows, word = self.windows, self.windows.served(self.worker)
        self.lock.enter_behind()
        if not windows.read(word + 1):
            self.lock.leave()
            return None
        # The apply was still under way after we were counted: before its next change the center finds us, and waits.

        def readable() -> int:
            served, done = windows.read_each(word, 2).tolist()
            return out.size if served == posted else int(done)

        windows.pull(self.wire, out, readable)  # its last piece comes when the message is served
        reply = self._with_counts(self._answer())
        self.lock.leave()
        return reply

    def _answer(self) -> Reply:
        windows = self.windows
        return Reply.decode(windows.get(windows.reply(self.worker), REPLY_WORDS).tobytes())

    def _answer_with(self, out: Array) -> Reply:
        """As `_answer`, with c, or c encoded, as it is written behind the reply."""
        words = self.windows.get(self.windows.reply(self.worker), REPLY_WORDS + self.windows.inline)
        out[...] = bring(words[REPLY_WORDS:].view(np.uint8)[: out.nbytes].view(out.dtype), out)
        return Reply.decode(words[:REPLY_WORDS].tobytes())

    def _with_counts(self, reply: Reply) -> Reply:
        """`reply` with clock and steps of c, which does not change now."""
        counts = self.windows.get(0, COUNTS).tolist()
        return reply._replace(clock=counts[CLOCK], steps=counts[STEPS])

    def pull(self, out: Array) -> Handle:
        """Get the center; needs nothing from the center rank but MPI progress now and then across hosts."""
        return Polled(partial(self.try_pull, out, Reply(0)))

    def try_pull(self, out: Array, reply: Reply, blocking: bool, offset: int = 0) -> Reply | None:
        """Get c as a whole, unless it is changing now; returns `reply` with clock and steps of c.

        `offset`: of c, or of c encoded, in the window.
        """
        if not self.lock.enter(blocking):
            return None
        reply = self._with_counts(reply)
        self.windows.pull(self.wire, out, offset=offset)  # last: a long vector evicts everything else from the cache
        self.lock.leave()
        return reply

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Put the last commit, with LEAVE, as one message; it is served when all have left."""
        last = commit or Commit(self.worker)
        return self.exchange(last._replace(requests=last.requests | LEAVE), out)


class RMACenter(WindowsCenter):
    """The center's end of the mailbox: rank 0 of `comm`; memory: c and a slot for each worker.

    `c`: (n,) center variable in host memory, copied into the window; `most`, `encoding`, `pull_encoding`: as of the
    workers.

    One poll finds all complete messages, and all of these are served before the next poll: the cost of a message does
    not grow with the number of workers, and nobody is served twice while another waits.
    """

    def __init__(
        self, comm: MPI.Comm, c: Array, most: int = MAX_CALL_BYTES, encoding: str = "float32",
        pull_encoding: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__(_windows(comm, c, most, encoding, pull_encoding), c)
        windows, workers = self.windows, comm.size - 1
        self._sizes = sizes(c.size, c.dtype)
        self._pulls = _shorter(pull_encoding, c)
        self._encoded = np.empty(0, np.uint8)  # c as it is pulled
        if self._pulls is not None:
            nbytes = self._pulls.nbytes(c.size, c.dtype)
            behind = windows.bytes_of(windows.center, windows.stride, nbytes)
            self._encoded = np.empty(nbytes, np.uint8) if windows.inline else behind
            self._pulls.prepare(c)
        self._encoded_clock = -1  # of what it holds
        self._comm, self._workers = comm, workers
        self._slots = [self._slot(worker) for worker in range(workers)]
        self._seen = np.zeros(workers, np.int64)  # number of each worker's last message that was polled
        self._last_poll = b""  # the numbers at the last poll
        self._due: deque[Commit] = deque()  # headers of messages that were polled and not served
        self._parked: deque[Commit] = deque()  # requests for work that others hold
        self._retry = False  # whether a message was served since a parked request was tried in vain
        self.lock = ReadersLock(ControlWord(windows, READERS))
        self._readable = 0  # up to where c may be read behind the apply
        self._applied: Commit | None = None  # while it is, if its worker may read behind
        self._left = list(range(workers))  # no session has begun
        self._start: Array | None = None  # what the next session starts from, if not from c as it is
        self._read_by = -workers  # final centers that must have been read before c may change again
        self._all_read = False

    @property
    def live(self) -> int:
        """Workers that have not left this session."""
        return self._workers - len(self._left)

    def _slot(self, worker: int) -> Array:
        windows = self.windows
        if windows.inline:
            return windows.words[windows.header(worker) + COMMIT_WORDS :].view(np.uint8)[: windows.slot_bytes]
        return windows.bytes_of(windows.slots, worker * windows.slot_stride, windows.slot_bytes)

    def start_from(self, c: Array) -> None:
        """Let the next session start from `c`, once all have read the final center of the last."""
        self._start = c

    def open(self) -> None:
        """Begin a session."""
        self._left.clear()
        self._read_by += self._workers
        self._all_read = False
        self._encoded_clock = -1  # c may have changed without its clock
        if self._start is not None:
            wait_until(self._final_center_was_read)
            self._c[...] = bring(self._start, self._c)
            self.windows.sync()
            self._start = None

    def serve_one(self, apply: Apply) -> bool:
        """Serve the first complete message not on hold; before it, a parked request that can be answered now."""
        self._comm.Iprobe()  # progress for what comes from other hosts
        if self._serve_parked(apply):
            return True
        commit = self._first()
        if commit is None:
            self._poll()
            commit = self._first()
        if self.lock.locked and (commit is None or not _changes(commit)):
            self.lock.unlock()  # the commit that it was for is on hold now
        served = commit is not None and self._serve(commit, apply)
        if not served and not self.windows.shared and self.lock.in_use():
            self.progress += 1
        return served

    def _poll(self) -> None:
        """Read the headers of all new complete messages."""
        windows = self.windows
        posted = windows.read_each(windows.posted, self._workers)
        if (words := posted.tobytes()) == self._last_poll and windows.shared:
            return
        self._last_poll, synced = words, False
        for worker in (posted != self._seen).nonzero()[0].tolist():
            if posted[worker] % 2:  # still being put
                self.progress += 1
                continue
            if not synced:
                windows.sync()
                synced = True
            header = windows.words[windows.header(worker) :][:COMMIT_WORDS].tobytes()
            self._due.append(Commit.split(header)[0].received_from(worker, self._sizes))
            self._seen[worker] = posted[worker]

    def _first(self) -> Commit | None:
        """The first message that is due and not on hold."""
        if self.hold is None:
            return self._due[0] if self._due else None
        return next((commit for commit in self._due if not (commit.nbytes and self.hold(commit))), None)

    def _serve(self, commit: Commit, apply: Apply) -> bool:
        windows, message = self.windows, commit
        if changes := _changes(commit):
            if not self._final_center_was_read() or not self.lock.lock():
                return False
            data = self._slots[commit.worker][: commit.nbytes]
            commit = commit._replace(payload=data if commit.encoding else data.view(self._c.dtype))
            if windows.shared and commit.requests & (PULL | LEAVE | ENCODED) == PULL:
                self._applied = commit
        reply = apply(commit, self._c)
        self._applied = None
        self._due.remove(message)
        if reply is None:
            self._parked.append(commit)
            self.progress += 1
            return False
        if self._readable:
            self._readable = 0
            windows.add(windows.served(commit.worker) + 1, 0, MPI.REPLACE)  # while new readers are still refused
        if not commit.requests & LEAVE:
            self._answer([commit.worker], reply, changes, commit.requests)
        else:
            self._left.append(commit.worker)
            self._answer(self._left if len(self._left) == self._workers else [], reply, changes)
        return True

    def _final_center_was_read(self) -> bool:
        """Whether all have read the final center of the session before: until then c stays as it is.

        After a break a rank may do something else, or wait for the others elsewhere, before it reads; so that the
        center, which is one of the others, waits for it here, and not at the end of the session.
        """
        self._all_read = self._all_read or self.windows.read(LEFT) >= self._read_by
        return self._all_read

    def _serve_parked(self, apply: Apply) -> bool:
        """Try the oldest parked request, if a message was served since the last unsuccessful try."""
        if not self._retry or not self._parked:
            return False
        reply = apply(self._parked[0], self._c)
        if reply is None:
            self._retry = False
            return False
        commit = self._parked.popleft()
        self._answer([commit.worker], reply, False, commit.requests)
        return True

    def _answer(self, workers: list[int], reply: Reply, unlock: bool, requests: int = 0) -> None:
        """Write the reply for `workers`, and mark their messages as served; `requests`: theirs."""
        windows, words = self.windows, self.windows.words
        answer = np.frombuffer(reply._replace(applied=(), snapshot=None).encode(), np.int64)
        words[CLOCK], words[STEPS] = reply.clock, reply.steps
        if self._pulls is not None and reply.clock != self._encoded_clock:
            # Nobody reads it: the lock is ours, or this is the first message of a session.
            encode_pull(self._pulls, self._c, self._encoded, reply.clock)
            self._encoded_clock = reply.clock
        pulled = self._encoded if requests & ENCODED else self._c.view(np.uint8)
        for worker in workers:
            words[windows.reply(worker) :][:REPLY_WORDS] = answer
            if windows.inline:
                words[windows.reply(worker) + REPLY_WORDS :].view(np.uint8)[: pulled.size] = pulled
        windows.sync()
        if unlock:
            self.lock.unlock()
        for worker in workers:
            windows.add(windows.served(worker), int(self._seen[worker]), MPI.REPLACE)
        self._retry = True

    def move_on(self, stop: int) -> None:
        """While a commit is being applied, and c is done up to `stop`: let its worker read that part."""
        windows = self.windows
        if self._applied and (stop - self._readable) * self._c.itemsize >= _PIECE and stop < self._c.size:
            self._readable = stop
            windows.sync()
            windows.add(windows.served(self._applied.worker) + 1, stop, MPI.REPLACE)

    def close(self) -> None:
        """Free the windows; collective. c is copied to memory of its own."""
        self._slots.clear()
        self._encoded = self._encoded[:0].copy()
        super().close()


def _windows(comm: MPI.Comm, like: Array, most: int, encoding: str, pull_encoding: str) -> Windows:
    """A slot for each worker, or room for a short vector behind each header and reply."""
    if like.nbytes <= INLINE:
        return Windows(comm, like, 0, most, like.nbytes)
    commits, pulls = _shorter(encoding, like), _shorter(pull_encoding, like)
    slot_bytes, encoded_bytes = (0 if e is None else e.nbytes(like.size, like.dtype) for e in (commits, pulls))
    return Windows(comm, like, comm.size - 1, most, 0, slot_bytes or None, encoded_bytes)


def _shorter(name: str, like: Array) -> Encoding | None:
    """The encoding, if it makes vectors like `like` (n,) shorter: it is used only then (`composed.encode`)."""
    encoding = get(name)
    return encoding if encoding.nbytes(like.size, like.dtype) < like.nbytes else None


def _changes(commit: Commit) -> bool:
    """Whether applying this message changes c: its delta lies in the slot, and fits."""
    return commit.nbytes > 0 and not commit.flags & MISFIT
