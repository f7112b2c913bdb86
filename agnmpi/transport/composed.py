"""Workers' ends that are made of others: several centers, each with a block of the center variable, and encodings.

Any transport that carries bytes carries an encoded vector.
"""

from collections.abc import Callable, Sequence

from ..arrays.backend import Array, empty, empty_like, on_host, zeros_like
from ..arrays.encodings import Encoding, get
from ..core.ends import Handle, WorkerEnd, all_done
from ..core.leases import Leases
from ..core.messages import DUPLICATE, ENCODED, NOT_FINITE, OK, WORK, Commit, Reply


class _AllShards:
    """Exchanges with all shards, under way at once; the reply is the first shard's."""

    def __init__(self, handles: Sequence[Handle], done: Callable[[list[Reply]], None]) -> None:
        self._handles, self._done = handles, done
        self._replies: list[Reply] = []

    def test(self) -> bool:
        """Make progress on all; whether all are done."""
        return all_done(self._handles)

    def wait(self) -> Reply:
        """Finish all."""
        if not self._replies:
            self._replies = [handle.wait() for handle in self._handles]
            self._done(self._replies)
        return self._replies[0]


class ShardedWorker(WorkerEnd):
    """A worker's end for several centers.

    A pull is whole per shard, not over all of them, and each shard has a clock of its own. The first grants the work.

    Args:
        ends: one for each center.
        spans: the block of each, together the whole vector.
    """

    def __init__(self, ends: Sequence[WorkerEnd], spans: Sequence[slice]) -> None:
        self.ends, self.spans = ends, spans
        self.forms_deltas = all(end.forms_deltas for end in ends)
        self._clocks = [0] * len(ends)  # of each shard at the last pull

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """Begin at each."""
        for end in self.ends:
            end.begin(total, period, work)

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Exchange with each center its block; a request for work alone goes to the first alone."""
        if commit.payload is None and out is None:
            return self.ends[0].exchange(commit, None)
        handles = [
            end.exchange(self._part(commit, i), None if out is None else out[self.spans[i]])
            for i, end in enumerate(self.ends)
        ]
        return _AllShards(handles, self._pulled if out is not None else lambda _replies: None)

    def pull(self, out: Array) -> Handle:
        """Pull each block; each is whole."""
        return _AllShards([end.pull(out[span]) for end, span in zip(self.ends, self.spans)], self._pulled)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Leave all centers."""
        handles = [
            end.leave(None if commit is None else self._part(commit, i), None if out is None else out[self.spans[i]])
            for i, end in enumerate(self.ends)
        ]
        return _AllShards(handles, self._pulled if out is not None else lambda _replies: None)

    def _part(self, commit: Commit, i: int) -> Commit:
        payload = None if commit.payload is None else commit.payload[self.spans[i]]
        origin = commit.origin and (commit.origin[0][self.spans[i]], commit.origin[1])
        requests = commit.requests if i == 0 else commit.requests & ~WORK
        return commit._replace(payload=payload, origin=origin, requests=requests, clock=self._clocks[i])

    def _pulled(self, replies: list[Reply]) -> None:
        self._clocks = [reply.clock for reply in replies]

    @property
    def residual(self) -> Array | None:
        """Those of the blocks, one behind the other; of a block that leaves nothing, zeros."""
        parts = [end.residual for end in self.ends]
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return None
        whole = empty(self.spans[-1].stop, some.dtype, some)
        for part, span in zip(parts, self.spans):
            whole[span] = 0 if part is None else part
        return whole

    def restore(self, residual: Array) -> None:
        """To each block its own."""
        for end, span in zip(self.ends, self.spans):
            end.restore(residual[span])

    def close(self) -> None:
        """Free what the ends hold; collective."""
        for end in self.ends:
            end.close()


class EncodedEnd(WorkerEnd):
    """A worker's end whose deltas and pulls are encoded.

        sent = encoded (delta + residual);  residual = delta + residual − decoded, if the commit is not refused

    A delta that is refused or dropped leaves the residual as it was. The last pull, in `leave`, is c itself.

    Args:
        end: what carries the bytes.
        like: a vector such as those that are exchanged (n,).
        commits: the encoding of deltas.
        pulls: that of c.

    Source: Seide et al. 2014 (error feedback); Philippenko and Dieuleveut 2021, arXiv:2102.12528 (what is pulled needs
    none, where the worker's o is what was decoded).
    """

    def __init__(self, end: WorkerEnd, like: Array, commits: Encoding, pulls: Encoding) -> None:
        self.end, self.commits, self.pulls = end, commits, pulls
        self.forms_deltas = not commits.exact and on_host(like)
        self._residual = None if commits.exact else zeros_like(like)
        self._next = None if commits.exact else empty_like(like)  # the residual, if the commit is accepted
        self._sent = None if commits.exact else empty(commits.nbytes(like.size, like.dtype), "u1", like)
        self._received = None if pulls.exact else empty(pulls.nbytes(like.size, like.dtype), "u1", like)
        for encoding in (commits, pulls):
            encoding.prepare(like)

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As the wrapped end."""
        self.end.begin(total, period, work)

    def exchange(self, commit: Commit, out: Array | None) -> "EncodedHandle":
        """Encode the delta, and exchange."""
        commit = self._encoded(commit)
        committed = bool(commit.encoding)
        if out is None or self._received is None:
            return EncodedHandle(self, self.end.exchange(commit, out), committed)
        commit = commit._replace(requests=commit.requests | ENCODED)
        return EncodedHandle(self, self.end.exchange(commit, self._received), committed, out)

    def pull(self, out: Array) -> Handle:
        """As the wrapped end: c itself."""
        return self.end.pull(out)

    def leave(self, commit: Commit | None, out: Array | None) -> "EncodedHandle":
        """Encode the last delta, and leave; the final center arrives as it is."""
        commit = None if commit is None else self._encoded(commit)
        return EncodedHandle(self, self.end.leave(commit, out), commit is not None and bool(commit.encoding))

    @property
    def residual(self) -> Array | None:
        """(n,) what earlier commits have left behind."""
        return self._residual

    def restore(self, residual: Array) -> None:
        """Copy `residual`, if deltas are encoded."""
        if self._residual is not None:
            self._residual[...] = residual

    def close(self) -> None:
        """As the wrapped end."""
        self.end.close()

    def _encoded(self, commit: Commit) -> Commit:
        if commit.payload is None or self._sent is None:
            return commit
        o, k = commit.origin or (None, 1)
        good = self.commits.encode(
            commit.payload, self._sent, residual=self._residual, new_residual=self._next, origin=o, divisor=k
        )
        flags = commit.flags if good else commit.flags | NOT_FINITE
        return commit._replace(payload=self._sent, origin=None, encoding=self.commits.number, flags=flags)

    def finish(self, reply: Reply, committed: bool, out: Array | None) -> None:
        """An exchange is done: keep its residual if its delta was applied; decode its pull into `out`, if any."""
        if committed and reply.status in (OK, DUPLICATE):
            # Swapped, not copied: another thread may be copying the old one for a checkpoint.
            self._residual, self._next = self._next, self._residual
        if out is not None and self._received is not None:
            self.pulls.decode(self._received, out)


class EncodedHandle(Handle):
    """An exchange of bytes (`handle`): `committed`: an encoded delta; `out`: where the encoded pull goes, if any."""

    def __init__(self, end: EncodedEnd, handle: Handle, committed: bool, out: Array | None = None) -> None:
        self.handle, self._end, self._committed, self._out = handle, end, committed, out
        self._reply: Reply | None = None

    def test(self) -> bool:
        """Make progress; whether the bytes are there."""
        return self.handle.test()

    def wait(self) -> Reply:
        """Finish the exchange; may be called again."""
        if self._reply is None:
            reply = self.handle.wait()
            self._end.finish(reply, self._committed, self._out)
            self._reply = reply
        return self._reply


def encode(end: WorkerEnd, like: Array, commits: str, pulls: str) -> WorkerEnd:
    """`end` with encodings of these names, each where it makes a vector like `like` (n,) shorter."""
    shorter = [e.nbytes(like.size, like.dtype) < like.nbytes for e in (get(commits), get(pulls))]
    first, second = (get(name if short else "float32") for name, short in zip((commits, pulls), shorter))
    return EncodedEnd(end, like, first, second) if any(shorter) else end
