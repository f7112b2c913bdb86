"""The Allreduce end: every rank trains and holds a replica of the center; no server rank.

A round is a nonblocking sum of counts and one of the deltas; after it each rank makes the same center step. A rank
that leaves early takes part in one more round, without a delta and with the flag that it leaves: after it all ranks
stop.

All ranks must use the same arithmetic: only CPUs or only GPUs. A GPU rounds once where a CPU rounds
twice (fused multiply-add), and the replicas would drift apart.
"""

import json
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, empty_like, full_like, on_host, to_host
from ..core.backoff import wait_until
from ..core.division import Division, rounds
from ..core.ends import Apply, Done, Handle, WorkerEnd
from ..core.leases import NONE, Lease, Leases
from ..core.messages import CONTINUE, NOT_FINITE, OK, STOP, WORK, Commit, Reply
from ..version import mpi_library
from .agreement import ConfigError, allgather, format_ranks, require_equal_total
from .chunks import Stream, Ticks
from .staging import CHUNK, Direct, Wire, cut

# Bytes summed per call: MPICH 5.0 and Open MPI 5.0 sum 40 MB in such pieces 1.1 to 2.6 times as fast as in one,
# and a waiting rank sees progress piece by piece, and stays awake. The send side is cut into chunks first (where it is
# staged), the receive side is not: the pieces of both must be the same.
_PIECE = 1 << 18
assert CHUNK % _PIECE == 0


class AllreduceEnd(WorkerEnd):
    """A rank's end; collective.

    Args:
        comm: the ranks.
        c: (n,) this rank's replica of the center, moved in place.
        apply: the center step.
        wire: how vectors are handed to MPI; directly by default.

    Raises:
        ConfigError: on all ranks, if some hold their replica on a CPU and others on a GPU.
    """

    def __init__(self, comm: MPI.Comm, c: Array, apply: Apply, wire: Wire | None = None) -> None:
        self.comm, self.c, self.apply = comm, c, apply
        self.wire = wire or Direct()
        _require_one_kind(comm, c)
        self.sum = empty_like(c)
        self.rounds: Iterator[Lease] = iter(())
        self.clock = self.steps = self.checkpoint = 0
        self.stopped = False  # a rank has left before the last round
        self._due = deque[Lease]()  # of the rounds that this rank has a lease for and has not started
        self._division = Division(None, 1, 0, [])
        self._finished = 0  # rounds
        self.given_up = 0  # steps of this session's rounds that were refused
        self._undone: list[Lease] = []  # what those who left in the last round had not done of their leases

    def begin(self, total: int | None, period: int, work: Leases) -> None:
        """As `WorkerEnd.begin`; raises ValueError, on all ranks, if they differ in `total`."""
        require_equal_total(self.comm, total)
        self.rounds = rounds(total, period, self.comm.rank, self.comm.size, work.next, work.free)
        self.stopped, self._division, self._finished, self.given_up = False, Division.of(work), 0, 0
        self._due.clear()
        self._undone.clear()

    def state(self) -> dict[str, Any]:
        """The work of this session after the rounds that are finished, as `Leases.state`."""
        return self._division.state(self._finished, self._undone, self.comm.size, self.given_up)

    def finished(self, undone: Lease | None, leaving: bool) -> None:
        """A round is finished. If ranks have left in it all exchange what they have not done: `undone`, of this one."""
        self._finished, self.stopped = self._finished + 1, leaving
        if leaving:
            everywhere = allgather(self.comm, json.dumps(undone))
            self._undone = [Lease(*json.loads(text)) for text in everywhere if text != "null"]

    def start(self) -> Lease:
        """The lease of the round that this rank starts."""
        return self._due.popleft()

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """Take part in a round with `commit`; without a payload, only read the replica and ask for work."""
        if commit.payload is not None:
            return Round(self, commit, out)
        if out is not None:
            out[...] = self.c
        return Done(Reply(self.clock, work=self.grant(commit.requests), steps=self.steps))

    def pull(self, out: Array) -> Handle:
        """Read the replica."""
        return self.exchange(Commit(self.comm.rank), out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """Tell the others in a last round, if any is left; else check that the replicas are equal."""
        if self.stopped or not self._due:
            return FinalCheck(self, out, check=not self.stopped)
        return Round(self, commit or Commit(self.comm.rank), out, leaving=True)

    def grant(self, requests: int) -> Lease:
        """The next lease of this rank, if asked for."""
        lease = next(self.rounds, NONE) if requests & WORK else NONE
        if lease.first >= 0:
            self._due.append(lease)
        return lease


def _require_one_kind(comm: MPI.Comm, c: Array) -> None:
    kinds = allgather(comm, "CPU" if on_host(c) else "GPU")
    if len(set(kinds)) > 1:
        texts = (f"{kind} on {format_ranks([r for r, k in enumerate(kinds) if k == kind])}" for kind in ("CPU", "GPU"))
        raise ConfigError(
            f"the parameters lie on CPUs and GPUs ({', '.join(texts)}): their sums round differently, and the replicas "
            "of the center would drift apart; use one kind (--device cpu), or a rule with a center rank"
        )


class FinalCheck:
    """The end of a session: after the last round the replicas are compared."""

    def __init__(self, end: AllreduceEnd, out: Array | None, check: bool) -> None:
        self._end, self._out = end, out
        digest = zlib.crc32(to_host(end.c).data)
        self._extremes = np.array([digest, -digest])
        self._request = end.comm.Iallreduce(MPI.IN_PLACE, self._extremes, MPI.MAX) if check else None

    def test(self) -> bool:
        """Whether the replicas have been compared."""
        return self._request is None or self._request.Test()

    def wait(self) -> Reply:
        """Finish; raises RuntimeError if the replicas differ."""
        wait_until(self.test)
        end = self._end
        if self._extremes[0] != -self._extremes[1]:
            raise RuntimeError(
                f"the replicas of the center differ between ranks: {mpi_library()} "
                "gave the ranks of an Allreduce different sums; use a rule with a center rank"
            )
        if self._out is not None:
            self._out[...] = end.c
        return Reply(end.clock, steps=end.steps)


class Round:
    """A round under way."""

    def __init__(self, end: AllreduceEnd, commit: Commit, out: Array | None, leaving: bool = False) -> None:
        self._end, self._commit, self._out = end, commit, out
        self._lease = end.start()
        self._reply: Reply | None = None
        loss = commit.loss * commit.steps if commit.steps else 0.0
        # A rank without steps adds nothing to the sum and does not count in the mean.
        bad = bool(commit.flags & NOT_FINITE)
        checkpoint = end.checkpoint if end.comm.rank == 0 else 0  # rank 0 saves, and all learn of it
        self._counts = np.array([commit.steps > 0, commit.steps, loss, leaving, checkpoint, bad], np.float64)
        # A send buffer on every rank: with MPI_IN_PLACE on some, Open MPI 5.0's ranks choose different algorithms.
        payload = commit.payload if commit.payload is not None and commit.steps else full_like(end.c, 0)
        self._payload = payload  # alive until the end: mpi4py 4.1 does not keep the buffers of nonblocking reductions
        self._requests = [end.comm.Iallreduce(MPI.IN_PLACE, self._counts)]
        receive_pieces = cut(end.wire.incoming(end.sum), _PIECE)
        self._ticks = Ticks()
        self._sum = Stream(
            lambda piece: end.comm.Iallreduce(piece, next(receive_pieces)),
            (piece for chunk in end.wire.outgoing(payload) for piece in cut(chunk, _PIECE)),
            payload.size,
            self._ticks,
            done=lambda part: end.wire.arrived(end.sum, part),
        )

    def test(self) -> bool:
        """Make progress; whether the round is done."""
        if self._reply is None:
            self._requests = [request for request in self._requests if not request.Test()]
            if self._sum.test() and not self._requests:
                self._reply = self._finish()
        return self._reply is not None

    def wait(self) -> Reply:
        """Finish the round."""
        wait_until(lambda: self.test() or not self._requests)
        # The counts have arrived, so all ranks take part: now bytes move, few at a time in MPICH 5.0. A rank that slept
        # in between would delay the others, which would then sleep, too.
        wait_until(self.test, lambda: self._ticks.count, spin=0.05)
        assert self._reply is not None
        return self._reply

    def _finish(self) -> Reply:
        end = self._end
        end.wire.settle(end.sum)
        commits, steps, loss, leaving, checkpoint, bad = self._counts.tolist()
        status = OK
        first, undone = self._lease.first + self._commit.steps, self._lease.steps - self._commit.steps
        end.finished(Lease(first, undone) if undone else None, bool(leaving))
        if commits:
            summed = self._commit._replace(
                requests=0,
                flags=NOT_FINITE if bad else 0,
                clock=end.clock,
                steps=int(steps),
                commits=int(commits),
                loss=loss / steps,
                payload=end.sum,
            )
            if bad:  # before it, as it may end the run
                end.given_up += int(steps)
            reply = end.apply(summed, end.c)
            assert reply is not None  # a round is never postponed
            end.clock, end.steps, end.checkpoint, status = reply.clock, reply.steps, reply.checkpoint, reply.status
        if self._out is not None:
            self._out[...] = end.c
        control = STOP if leaving else CONTINUE
        work = end.grant(self._commit.requests)
        return Reply(end.clock, status, control, work, end.steps, max(int(checkpoint), end.checkpoint))
