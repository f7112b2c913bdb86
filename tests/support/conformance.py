"""What every transport with a center rank must hold, for any world size; each check is a pair of roles.

`play(world, work, ...)` runs `work(end, index)` on every worker while the center serves, and returns on the
center rank (for local: everywhere) a Log of all that was applied, plus what each worker returned.
"""

from typing import Any, NamedTuple

import numpy as np

from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Held, Leases
from agnmpi.core.messages import DUPLICATE, OK, WORK, Commit
from agnmpi.transport.local import LocalCenter
from agnmpi.transport.registry import local

# One element, fewer than a piece, and more than all pieces in flight (16 MiB of p2p's; 2.2 M float64 are 17.6 MB).
SIZES = [1, 1000, 2_200_000]


def commits_of(n):
    """How many each worker makes of vectors (n,): of many pieces, fewer."""
    return 12 if n <= 1000 else 3


class Outcome(NamedTuple):
    """What a session left behind; on a worker rank only `results` (its own) is filled."""

    c: Any = None
    center: Any = None
    log: Any = ()  # commits in the order they were applied
    results: Any = ()


class LocalWorld:
    """Workers and center in this process: each worker's part runs from beginning to end, one after the other."""

    capabilities = local().capabilities

    def __init__(self, workers):
        self.workers = workers

    def blocks(self, n):
        return [slice(0, n)]

    def play(self, n, work, sessions=1, total=None, **_):
        center, log = Center(rules.agn(), np.zeros(n), self.workers), []
        center.leases = None if total is None else Leases(total, 1)
        there = LocalCenter(np.zeros(n), self.workers, logged(center, log))
        results = []
        for _ in range(sessions):
            there.open()
            results += [work(there.worker_end(i), i) for i in range(self.workers)]
        return Outcome(there.c, center, log, results)


def logged(center, log):
    def apply(commit, c):
        reply = center.apply(commit, c)
        if commit.payload is not None and reply.status == OK:
            log.append(commit._replace(payload=None))
        return reply

    return apply


def leave(end, n):
    final = np.full(n, np.nan)
    end.leave(None, final).wait()
    return final


def nothing_lost_nothing_twice(world, n):
    """Sums of distinct powers and counts: each commit of each worker is in the center exactly once, in order."""

    def work(end, index):
        out = np.empty(n)
        for k in range(1, commits_of(n) + 1):
            payload = np.full(n, float((index + 1) * 1000 + k))
            reply = end.exchange(Commit(index, k, steps=1, payload=payload), out).wait()
            assert reply.status == OK
        return leave(end, n)

    outcome = world.play(n, work)
    total = sum((w + 1) * 1000 + k for w in range(world.workers) for k in range(1, commits_of(n) + 1))
    finals = [] if isinstance(world, LocalWorld) else outcome.results
    for final in finals:  # every worker holds the same final center
        np.testing.assert_array_equal(final, total)
    if outcome.c is None:
        return
    np.testing.assert_array_equal(outcome.c, total)
    assert outcome.center.clock == world.workers * commits_of(n)
    assert outcome.center.steps == world.workers * commits_of(n)
    if not world.capabilities.exact_clock:
        return
    assert len(outcome.log) == world.workers * commits_of(n)
    assert outcome.center.applied == [commits_of(n)] * world.workers
    for w in range(world.workers):
        assert [c.sequence for c in outcome.log if c.worker == w] == list(range(1, commits_of(n) + 1))


def no_torn_read_and_an_exact_clock(world, n):
    """Every commit adds 1 to every element: a pull of clock t is t in every element, and t never goes back.

    With several centers each block is whole, and the clock is the first's.
    """

    def whole(out):
        for block in world.blocks(n):
            assert out[block].min() == out[block].max()
        return out[0]

    def work(end, index):
        out, one, clock = np.empty(n), np.ones(n), 0
        for k in range(1, commits_of(n) + 1):
            reply = end.exchange(Commit(index, k, clock=clock, payload=one), out).wait()
            assert whole(out) == reply.clock
            assert reply.clock > clock, "a commit moves the clock"
            pulled = end.pull(out).wait()
            assert whole(out) == pulled.clock
            assert pulled.clock >= reply.clock, "the clock went back"
            clock = pulled.clock
        leave(end, n)

    world.play(n, work)


def own_commits_are_seen(world, n):
    """Element i mod n counts the commits of worker i: a pull shows all of one's own."""

    def work(end, index):
        out, payload, mine = np.empty(n), np.zeros(n), index % n
        payload[mine] = 1
        sharing = len([w for w in range(world.workers) if w % n == mine])
        for k in range(1, commits_of(n) + 1):
            end.exchange(Commit(index, k, payload=payload), None).wait()
            end.pull(out).wait()
            assert k <= out[mine] <= sharing * commits_of(n)
            if sharing == 1:
                assert out[mine] == k
        leave(end, n)

    world.play(n, work)


def handles_test_and_wait(world, n):
    """`test` alone finishes an exchange in a world that serves by itself; `wait` may be called again."""

    def work(end, index):
        out = np.empty(n)
        handle = end.exchange(Commit(index, 1, payload=np.ones(n)), out)
        if not isinstance(world, LocalWorld):
            while not handle.test():
                pass
        first = handle.wait()
        assert handle.test()
        assert handle.wait() == first
        leave(end, n)

    world.play(n, work)


def a_commit_sent_again_is_not_applied_again(world, n):
    def work(end, index):
        out = np.empty(n)
        commit = Commit(index, 1, payload=np.ones(n))
        assert end.exchange(commit, out).wait().status == OK
        assert end.exchange(commit, out).wait().status == DUPLICATE
        leave(end, n)

    outcome = world.play(n, work)
    if outcome.c is not None:
        np.testing.assert_array_equal(outcome.c, world.workers)
        assert outcome.center.clock == world.workers


def sessions_follow_each_other(world, n):
    """After all have left, the same ends serve again, and nothing is forgotten."""
    sequence, commits = {}, commits_of(n) // 3

    def work(end, index):
        out = np.empty(n)
        for _ in range(commits):
            sequence[index] = sequence.get(index, 0) + 1
            end.exchange(Commit(index, sequence[index], payload=np.ones(n)), out).wait()
        return leave(end, n)

    outcome = world.play(n, work, sessions=3)
    if not isinstance(world, LocalWorld):
        for session, final in enumerate(outcome.results, 1):
            np.testing.assert_array_equal(final, commits * world.workers * session)
    if outcome.c is not None:
        np.testing.assert_array_equal(outcome.c, 3 * commits * world.workers)


def a_leave_needs_no_pull(world, n):
    """The last commit of whoever leaves without one is applied; the others get the final center."""
    sequence = {}

    def work(end, index):
        session = sequence[index] = sequence.get(index, 0) + 1
        final = np.full(n, np.nan) if (index + session) % 2 else None
        end.leave(Commit(index, session, payload=np.ones(n)), final).wait()
        return final

    outcome = world.play(n, work, sessions=2)
    if not isinstance(world, LocalWorld):
        for session, final in enumerate(outcome.results, 1):
            if final is not None:
                np.testing.assert_array_equal(final, world.workers * session)
    if outcome.c is not None:
        np.testing.assert_array_equal(outcome.c, 2 * world.workers)


def commits_of_several_leases(world, n):
    """A worker holds several leases and commits some of their steps at once; the rest stays its own."""
    total = 8 * world.workers

    def work(end, index):
        held, sequence, out = Held(wait=False), 0, np.empty(n)
        reply = end.exchange(Commit(index, requests=WORK, total=total, wanted=3), out).wait()
        while reply.work.steps or held.leases:
            if reply.work.steps:
                held.add(reply.work, reply.period)
            for _ in range(1 + sequence % 3):
                held.done += not held.is_used_up
            steps, parts, sequence = held.done, held.take(), sequence + 1
            commit = Commit(
                index, sequence, steps, parts[0].first, reply.clock, requests=WORK, wanted=2,
                parts=tuple(parts) if len(parts) > 1 else (), payload=np.full(n, float(steps)),
            )  # fmt: skip
            reply = end.exchange(commit, out).wait()
            assert reply.status == OK
        return leave(end, n)

    outcome = world.play(n, work, total=total)
    if outcome.c is None:
        return
    np.testing.assert_array_equal(outcome.c, total)
    assert outcome.center.steps == total
    if world.capabilities.single_commits:
        parts = [part for commit in outcome.log for part in commit.leases]
        assert sorted(step for part in parts for step in range(part.first, part.first + part.steps)) == list(
            range(total)
        )


CHECKS = [
    nothing_lost_nothing_twice,
    no_torn_read_and_an_exact_clock,
    own_commits_are_seen,
    handles_test_and_wait,
    a_commit_sent_again_is_not_applied_again,
    sessions_follow_each_other,
    a_leave_needs_no_pull,
    commits_of_several_leases,
]
# What must be declared for a check to hold.
NEEDS = {no_torn_read_and_an_exact_clock: ("whole_pulls", "exact_clock")}


def declared(world, check):
    return all(getattr(world.capabilities, need) for need in NEEDS.get(check, ()))
