"""Several centers, each with a block of the center variable: one worker end made of one end per center.

A pull is whole per shard, not over all of them, and each shard has a clock of its own. Work is granted by the first.
"""

from collections.abc import Callable, Sequence

from ..arrays.backend import Array
from ..core.ends import Handle, WorkerEnd, all_done
from ..core.messages import WORK, Commit, Reply


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
    """A worker's end. `ends`: one for each center; `spans`: the block of each, together the whole vector."""

    def __init__(self, ends: Sequence[WorkerEnd], spans: Sequence[slice]) -> None:
        self.ends, self.spans = ends, spans
        self._clocks = [0] * len(ends)  # of each shard at the last pull

    def begin(self, total: int | None, period: int, start: int) -> None:
        """Begin at each."""
        for end in self.ends:
            end.begin(total, period, start)

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

    def leave(self, commit: Commit | None, out: Array) -> Handle:
        """Leave all centers."""
        handles = [
            end.leave(None if commit is None else self._part(commit, i), out[self.spans[i]])
            for i, end in enumerate(self.ends)
        ]
        return _AllShards(handles, self._pulled)

    def _part(self, commit: Commit, i: int) -> Commit:
        payload = None if commit.payload is None else commit.payload[self.spans[i]]
        requests = commit.requests if i == 0 else commit.requests & ~WORK
        return commit._replace(payload=payload, requests=requests, clock=self._clocks[i])

    def _pulled(self, replies: list[Reply]) -> None:
        self._clocks = [reply.clock for reply in replies]

    def close(self) -> None:
        """Free what the ends hold; collective."""
        for end in self.ends:
            end.close()
