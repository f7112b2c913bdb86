"""Who takes over from a lost center, and that no step is lost or taken twice; what tests may lose: all without MPI."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnmpi.cluster.placement import fault_tolerant
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Held, Lease, Leases
from agnmpi.core.messages import (
    DROPPED,
    IDLE,
    NOT_FINITE,
    PULL,
    WAIT,
    WORK,
    Commit,
    Reply,
    Snapshot,
    max_open_leases,
    reply_bytes,
)
from agnmpi.recovery.election import SurvivorReport, elect, take_over
from agnmpi.training.fault_injection import Fault, read_faults

TOTAL = 40


def report(worker=0, session=1, clock=0, served=0, sequence=0, under_way=(), held=()):
    return SurvivorReport(worker + 1, worker, session, clock, served, sequence, list(under_way), list(held))


def test_the_last_pull_is_elected():
    assert elect([report(served=3), report(served=7), report(served=7)]) == 1
    assert elect([report(served=-1), report(served=-1)]) == 0
    with pytest.raises(RuntimeError, match="between two loops"):
        elect([report(session=1), report(session=2)])
    for told in ([report(clock=5, served=-1), report(clock=4, served=9)], [report(clock=7, served=-1)]):
        with pytest.raises(RuntimeError, match="snapshot was too long"):
            elect(told)


def test_a_book_travels_whole_or_not_at_all():
    snapshot = Snapshot(9, 1, 100, 3, 2, 1, 0, 4, (Lease(4, 2), Lease(90, 10)))
    reply = Reply(5, applied=(1, 2, 3), snapshot=snapshot)
    assert Reply.decode(reply.encode()) == reply
    assert Reply.decode(reply.encode() + bytes(64)) == reply, "in a longer buffer, too"
    full = reply._replace(snapshot=snapshot._replace(open=tuple(Lease(2 * i, 1) for i in range(max_open_leases(3)))))
    assert len(full.encode()) == reply_bytes(3, True)
    assert Reply.decode(full.encode()) == full
    longer = reply._replace(
        snapshot=snapshot._replace(open=tuple(Lease(2 * i, 1) for i in range(max_open_leases(3) + 1)))
    )
    assert Reply.decode(longer.encode()).snapshot is None


class Trainee:
    """A worker as the center sees it: what it holds, what it has sent, what it was told."""

    def __init__(self, index, wait):
        self.rank = index
        self.index, self.sequence, self.last_reply, self.clock = index, 0, None, 0
        self.c, self.held, self.commit = 0.0, Held(wait), None
        self.done = False

    def message(self, bad=False, pull=True, steps=TOTAL):
        if self.commit is not None:
            return self.commit
        requests = WORK | (PULL if pull else 0)
        if not self.held.leases:
            return Commit(self.index, requests=requests | IDLE, total=TOTAL, wanted=self.held.wanted(0))
        while self.held.done < steps and not self.held.is_used_up:
            self.held.done += 1
        done, parts = self.held.done, self.held.take()
        self.sequence += 1
        numbers = self.index, self.sequence, done, parts[0].first, self.clock
        self.commit = Commit(
            *numbers, requests=requests, flags=NOT_FINITE if bad else 0, wanted=self.held.wanted(0),
            parts=tuple(parts) if len(parts) > 1 else (), payload=np.array([float(done)]),
        )  # fmt: skip
        return self.commit

    def take(self, reply, c):
        if reply is None:
            return  # it waits
        if reply.snapshot is not None:
            self.last_reply, self.clock, self.c = reply, reply.clock, float(c[0])
        self.commit = None
        if reply.work.steps:
            self.held.add(reply.work, reply.period)
        elif reply.control != WAIT:
            self.done = True

    def testify(self):
        snapshot = self.last_reply.snapshot if self.last_reply else None
        commit = self.commit
        sent = list(commit.leases) if commit and not commit.flags & NOT_FINITE else []
        sequence = commit.sequence if commit else 0
        served = snapshot.served if snapshot else -1
        return SurvivorReport(self.rank, self.index, 1, self.clock, served, sequence, sent, list(self.held.leases))


def made(c, workers):
    rule = rules.weighted(rules.agn(), rules.staleness_cap(2))  # some are dropped
    center = Center(rule, c, workers, patience=10**9)
    center.leases, center.replicates_state, center.idle_workers_wait, center.session = Leases(TOTAL, 3), True, True, 1
    return center


def test_steps_that_two_claim_are_the_holders():
    """A commit was dropped, unheard, and its steps granted to another: sent again, it counts as answered."""
    center = made(np.zeros(1), 2)
    leases = {"next": 9, "free": [Lease(3, 6)]}
    told = [
        report(worker=2, served=9),
        report(worker=0, sequence=5, under_way=[Lease(3, 3)]),
        report(worker=1, sequence=8, under_way=[Lease(9, 3)], held=[Lease(3, 3)]),
    ]
    assert take_over(center, leases, {1: 4, 2: 7, 3: 1}, told, 1) is None
    assert center.applied == [4, 7]
    late = Commit(0, 5, 3, 3, center.clock, payload=np.ones(1))
    assert center.apply(late, np.zeros(1)).status == DROPPED
    assert [center.leases.held_by(worker) for worker in (0, 1)] == [[], [Lease(3, 3), Lease(9, 3)]]
    assert center.leases.free == [Lease(6, 3)]
    assert center.leases.committed == 3


@given(st.data())
def test_after_any_history_each_step_is_taken_once(data):
    """Commits and requests in any order, answered or not, refused or not; workers die, and then the center; twice.

    Without waiting, commits are of any number of steps, of several leases.
    """
    c, wait = np.zeros(1), data.draw(st.booleans())
    trainees = [Trainee(i, wait) for i in range(data.draw(st.integers(2, 5)))]
    center = made(c, len(trainees))
    for _ in range(2):
        for _ in range(data.draw(st.integers(0, 25))):
            who = data.draw(st.sampled_from(trainees))
            fate = data.draw(st.sampled_from(["answered"] * 5 + ["unheard", "bad", "dies", "silent"]))
            if fate == "silent":  # its steps go to others, and it comes back
                center.worker_lost(who.index)
                continue
            if who.done or (who.commit is not None and fate != "dies"):
                continue  # its answer never comes
            if fate == "dies" and len(trainees) > 2:
                center.worker_lost(who.index)
                trainees.remove(who)
                continue
            steps = TOTAL if wait else data.draw(st.integers(1, 9))
            reply = center.apply(who.message(fate == "bad", data.draw(st.booleans()), steps), c)
            if fate != "unheard":
                who.take(reply, c)
        # The center dies. (What it applied last may have been heard of by nobody.)
        reports = [trainee.testify() for trainee in trainees]
        winner = elect(reports)
        elected = trainees[winner]
        snapshot = elected.last_reply.snapshot if elected.last_reply else Snapshot(session=1)
        steps = elected.last_reply.steps if elected.last_reply else 0
        told = elected.last_reply.applied if elected.last_reply else [0] * 9
        applied = {trainee.rank: told[trainee.index] for trainee in trainees}
        leases = {"next": snapshot.next, "free": snapshot.open, "given_up": snapshot.given_up}
        c, order = np.array([elected.c]), [winner, *(i for i in range(len(trainees)) if i != winner)]
        center = made(c, len(trainees) - 1)
        center.clock, center.steps, center.served = elected.clock, steps, snapshot.served
        further = take_over(center, leases, applied, [reports[i] for i in order], 1)
        if further is not None:
            center.applied.append(elected.commit.sequence - 1)
            center.apply(elected.commit._replace(worker=further, requests=0), c)
            center.applied.pop()
        others = [trainees[i] for i in order[1:]]
        for trainee in others:
            if trainee.last_reply:  # as Failover does
                told = trainee.last_reply.applied
                trainee.last_reply = trainee.last_reply._replace(applied=tuple(told[other.index] for other in others))
        for i, trainee in enumerate(others):
            trainee.index = i
            if trainee.commit is not None:  # sent again
                trainee.take(center.apply(trainee.commit._replace(worker=i), c), c)
        trainees = others
        if len(trainees) < 2:
            break
    for _ in range(10 * TOTAL):
        for trainee in trainees:
            trainee.done = False
            trainee.take(center.apply(trainee.message(), c), c)
    taken = TOTAL - center.leases.given_up
    assert c[0] == taken
    assert (center.steps, center.leases.committed, center.leases.open()) == (taken, taken, [])


def test_faults_are_read_and_only_when_asked():
    assert read_faults("") == []
    assert read_faults("stall:1@20:2") == [Fault("stall", 1, 20, 2.0)]
    with pytest.raises(ValueError, match="KIND:RANK@AT"):
        read_faults("explode:1@2")
    assert fault_tolerant({"OMPI_MCA_mpi_ft_enable": "1"})
    assert fault_tolerant({"AGNMPI_FT": "1"})
    assert not fault_tolerant({})
