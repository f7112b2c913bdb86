"""A p2p center and its workers, fakes in one process: what more workers cost, who waits, who is lost."""

import sys
import time

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi.bench.fake_peers import FakePeers
from agnmpi.bench.scaling import center_of_fakes, commit_of, measure
from agnmpi.core.messages import IDLE, LEAVE, MISFIT, PULL, SPARE, UNCALLED, WAIT, WORK, Commit, Reply
from agnmpi.transport.chunks import INLINE, PIECE
from agnmpi.transport.p2p import IN_FLIGHT, P2PWorker
from agnmpi.transport.p2p_center import P2PCenter
from agnmpi.transport.peers import DELTA

N = 1000  # too long to travel with a header
ASK = WORK | IDLE | PULL


class Served:
    """An end with its fake workers; what it has served, and who was lost; `answer` gives the reply to each message."""

    def __init__(self, workers, message_buffers=4, peers=None, n=N, kept=0):
        self.peers = peers or FakePeers(workers)
        self.end = P2PCenter(self.peers, np.zeros(n), message_buffers, kept=kept)
        self.order, self.lost, self.joined, self.answer = [], [], [], lambda commit: Reply(len(self.order))
        self.end.on_loss, self.end.on_join = self.lost.append, self.joined.append
        self.end.open()

    def apply(self, commit, c):
        reply = self.answer(commit)
        if reply is not None:
            self.order.append((commit.worker, commit.sequence))
        return reply

    def delta(self, worker, sequence=1, requests=PULL):
        self.peers.send(Commit(worker, sequence, requests=requests), self.end.c.nbytes)

    def ask(self, worker, requests=ASK):
        self.peers.send(Commit(worker, requests=requests))

    def run(self, turns=20):
        for _ in range(turns):
            self.end.serve_one(self.apply)


def calls_of(act):
    """How many functions Python enters in `act`."""
    count = 0

    def note(_frame, event, _arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def costs(workers):
    """Of a look that finds nothing, of a commit with its reply, and of all farewells: calls of functions and of MPI."""
    peers, end, center = center_of_fakes(workers)
    end.serve_one(center.apply)

    def cost(act, times=1):
        before = peers.calls.total()
        return [calls_of(act) / times, (peers.calls.total() - before) / times]

    def serve():
        while end.serve_one(center.apply):
            pass

    def leave():
        while end.live:
            end.serve_one(center.apply)

    costs = cost(lambda: end.serve_one(center.apply))
    for worker in range(10):
        peers.send(commit_of(center, worker), end.c.nbytes)
    costs += cost(serve, 10)
    assert center.clock == 10
    for worker in range(workers):
        peers.send(Commit(worker, requests=LEAVE | PULL))
    return costs + cost(leave, workers) + [peers.nbytes["reply"] / (10 + workers)]


def test_what_a_message_costs_does_not_grow_with_the_number_of_workers():
    few, many = costs(10), costs(1000)
    assert all(few)
    assert [b < 1.5 * a for a, b in zip(few, many)] == [True] * len(few), (few, many)


def test_the_bench_of_scaling_measures():
    row = measure(5)
    assert row["reply_bytes"] == 80
    assert min(row.values()) > 0


def test_all_that_is_ready_is_served_in_the_order_of_arrival():
    served = Served(3)
    for worker in (2, 0, 1):
        served.ask(worker)
    served.run(3)
    assert [worker for worker, _ in served.order] == [2, 0, 1]


def test_messages_of_one_worker_are_served_in_order():
    served = Served(2)
    served.delta(0, 1)
    served.delta(0, 2)
    served.peers.send(Commit(0, 3, requests=LEAVE | PULL))
    served.delta(1, 1)
    served.run()
    assert [sequence for worker, sequence in served.order if worker == 0] == [1, 2, 3]
    assert served.end.live == 1


def test_a_parked_request_is_answered_when_work_comes_free():
    """In order of arrival, by one reply each, and again after each later message until then."""
    served, asked, free = Served(4), [], []

    def answer(commit):
        if commit.nbytes:
            return Reply(1)
        asked.append(commit.worker)
        if free:
            return Reply(2, control=free.pop())
        return None

    served.answer = answer
    for worker in (2, 0, 1):
        served.ask(worker)
    served.run(3)
    assert served.order == []
    assert served.peers.sent == {}
    del asked[:]
    served.delta(3)
    served.end.serve_one(served.apply)
    assert asked == [2], "the first alone: for the others there is no work either"
    free += [WAIT, WAIT]
    served.delta(3, 2)
    served.run(1)
    assert asked == [2, 2, 0, 1]
    assert served.order == [(3, 1), (3, 2), (2, 0), (0, 0)]
    assert set(served.peers.sent) == {3, 2, 0}
    assert served.end.live == 4


def test_a_parked_request_is_answered_when_who_held_the_work_is_lost():
    served = Served(2)
    served.answer = lambda commit: Reply(0) if served.lost else None
    served.ask(1)
    served.run(2)
    assert served.order == []
    served.peers.dying.add(0)
    served.run(2)
    assert served.lost == [0]
    assert served.order == [(1, 0)]


def test_a_held_commit_is_not_begun_and_what_has_begun_is_applied():
    served = Served(3)
    served.peers.hanging.add(0)
    served.delta(0, 5)
    served.run(2)
    assert served.end.in_flight_deltas == 1
    asked = []
    served.end.hold = lambda commit: asked.append(commit) or commit.sequence > 5
    served.delta(1, 6)
    served.delta(2, 4)
    served.ask(1)
    served.peers.hanging.clear()
    served.run()
    assert served.order == [(0, 5), (2, 4)], "neither the held one nor what its worker has sent behind it"
    assert served.end.in_flight_deltas == 0
    assert all(commit.nbytes for commit in asked)
    served.end.hold = None
    served.run()
    assert served.order[2:] == [(1, 6), (1, 0)]


@pytest.mark.parametrize("nbytes", [80, 72, 88])
@pytest.mark.parametrize("announced", [80, 72])
def test_a_short_delta_comes_with_its_header_and_c_with_the_reply(announced, nbytes):
    served = Served(1, n=10)
    commits, delta = [], np.arange(11.0)[: nbytes // 8]
    served.answer = lambda commit: commits.append(commit) or Reply(7)
    served.peers.send(Commit(0, 1, requests=PULL), announced, delta.tobytes())
    served.end.hold = lambda commit: True
    served.run(2)
    assert (commits, served.end.in_flight_deltas) == ([], 0)
    served.end.hold = lambda commit: False
    served.run(2)
    (commit,) = commits
    if announced == nbytes == 80:
        assert not commit.flags
        assert commit.payload.tolist() == delta.tolist()
    else:
        assert commit.flags == MISFIT
    message = served.peers.sent[0]
    assert np.frombuffer(message, "f8", 10).tolist() == served.end.c.tolist()
    assert Reply.decode(message[80:]).clock == 7
    assert served.peers.calls["Irecv"] == 0
    assert served.peers.calls["Isend"] == 1
    assert (served.end.in_flight_deltas, served.end.buffers_allocated) == (0, 0)


def test_buffers_lent_for_silent_workers_are_taken_back():
    """A worker that falls silent amid its delta, or amid its reply, and is back, again and again."""
    served = Served(3, message_buffers=1)
    for sequence in range(1, 9, 2):
        for what in ("delta", "reply"):
            if what == "delta":
                served.peers.hanging.add(0)
            served.delta(0, sequence + (what == "reply"))
            if what == "reply":
                served.answer = lambda commit: served.peers.hanging.add(0) or Reply(0)
            served.run()
            served.answer = lambda commit: Reply(0)
            served.end.stop_waiting_for(0)
            assert served.end.silent == {0}
            assert served.end.live == 2
            before = len(served.order)
            for worker in (1, 2):
                served.delta(worker, sequence)
            served.run()
            assert len(served.order) == before + 2, "the others have a buffer"
            served.peers.hanging.clear()
            served.ask(0, WORK)
            served.run()
            assert served.end.silent == set()
            assert served.end.live == 3
            assert served.end.buffers_allocated <= 2
    served.delta(1, 99)
    served.run()
    assert served.end.buffers_allocated == 1


class FailingReceives(FakePeers):
    """The receive of a delta fails when it is posted: at which piece of it."""

    at = 0

    def Irecv(self, buffer, source, tag):
        if tag == DELTA and source - 1 in self.dying:
            self.at -= 1
            if self.at < 0:
                raise MPI.Exception(MPI.ERR_PROC_FAILED)
        return super().Irecv(buffer, source, tag)

    def Improbe(self, source, tag, status):
        self.acknowledged = self.dying  # the probe does not tell of them
        return super().Improbe(source, tag, status)


@pytest.mark.parametrize("at", [0, 1])
def test_no_buffer_is_lost_with_a_worker_whose_receives_fail(at):
    served = Served(4, message_buffers=1, peers=FailingReceives(4), n=PIECE // 4)
    served.peers.dying |= {0, 1, 2}
    for worker in range(4):
        served.peers.at = at
        served.delta(worker)
        served.run(3)
    assert sorted(served.lost) == [0, 1, 2]
    assert served.order == [(3, 1)]
    assert served.end.in_flight_deltas == 0


def in_state(served, state):
    """Bring worker 0 of three into a state."""
    if state == "queued":
        served.peers.hanging.add(1)
        served.delta(1)
        served.delta(0)
    elif state == "receiving":
        served.peers.hanging.add(0)
        served.delta(0)
    elif state == "parked":
        served.answer = lambda commit: None if commit.requests & IDLE else Reply(0)
        served.ask(0)
    elif state == "answering":
        served.peers.hanging.add(0)
        served.ask(0, PULL)
    elif state == "silent":
        served.peers.hanging.add(0)
        served.delta(0)
        served.run()
        served.end.stop_waiting_for(0)
    elif state == "left":
        served.ask(0, LEAVE | PULL)
    elif state == "spare":
        served.ask(0, WORK | PULL | SPARE)
    served.run()


@pytest.mark.parametrize(
    "state", ["listening", "queued", "receiving", "parked", "answering", "silent", "left", "spare"]
)
def test_a_worker_may_die_in_any_state(state):
    """It is reported once, holds up nobody, and costs no buffer."""
    served = Served(3, message_buffers=1)
    in_state(served, state)
    served.peers.hanging.clear()
    served.peers.dying.add(0)
    served.run()
    assert served.lost == [0]
    assert served.end.lost == {0}
    assert served.end.silent == set()
    for worker in (1, 2):
        served.delta(worker, 7)
    served.run()
    assert served.order[-2:] == [(1, 7), (2, 7)]
    assert served.end.in_flight_deltas == 0
    for worker in (1, 2):
        served.ask(worker, LEAVE | PULL)
    served.run()
    assert served.end.live == 0
    assert not served.end.deserted
    assert served.lost == [0]


def test_a_death_found_amid_an_apply_is_reported_after_it():
    served, amid = Served(3), []

    def answer(commit):
        served.peers.dying.add(commit.worker)
        served.end.move_on(N)
        amid.append(list(served.lost))
        return Reply(0)

    served.answer = answer
    served.delta(0)
    served.run()
    assert amid == [[]]
    assert served.lost == [0]
    assert served.end.live == 2
    served.answer = lambda commit: served.end.serve_one(served.apply)
    served.delta(1)
    with pytest.raises(AssertionError, match="during an apply"):
        served.run()


def test_who_loses_all_workers_is_deserted():
    served = Served(2)
    served.peers.dying |= {0, 1}
    served.run()
    assert served.end.deserted
    assert sorted(served.lost) == [0, 1]


def test_spares_are_called_in_the_place_of_the_lost_and_the_silent():
    """One for each, the lowest first; their requests are served then."""
    served = Served(6, kept=2)
    for spare in (5, 3, 2, 4):
        served.ask(spare, WORK | PULL | SPARE)
    served.run()
    assert (served.order, served.end.live, sorted(served.end.spares)) == ([], 2, [2, 3, 4, 5])
    served.peers.dying.add(0)
    served.run()
    assert (served.joined, served.order, served.end.live) == ([2], [(2, 0)], 2)
    served.end.stop_waiting_for(1)
    served.run()
    assert (served.joined, served.order, served.end.live) == ([2, 3], [(2, 0), (3, 0)], 2)
    served.peers.dying |= {2, 3}
    served.run()
    assert (served.joined, served.end.live, served.end.deserted) == ([2, 3, 4, 5], 2, False)
    assert served.order[2:] == [(4, 0), (5, 0)]


def test_a_spare_that_comes_late_is_called_at_once():
    served = Served(3, kept=2)
    served.peers.dying.add(0)
    served.run()
    assert served.end.live == 2, "it is awaited"
    served.ask(2, WORK | PULL | SPARE)
    served.run()
    assert (served.joined, served.order, served.end.live) == ([2], [(2, 0)], 2)


def test_spares_that_are_not_called_are_told_when_all_have_left():
    served = Served(3, kept=2)
    for _session in range(2):
        served.end.open()
        served.ask(2, WORK | PULL | SPARE)
        served.peers.sent.clear()
        for worker in (0, 1):
            served.run()
            assert served.peers.sent == {}
            served.ask(worker, LEAVE | PULL)
        served.run()
        assert served.end.live == 0
        assert {worker: Reply.decode(reply).control for worker, reply in served.peers.sent.items()} == {
            0: 0, 1: 0, 2: UNCALLED,
        }  # fmt: skip
    assert served.joined == []


@pytest.mark.parametrize("watchdog", ["0.2", "0"])
def test_the_end_waits_for_a_spare_that_has_not_come_no_longer_than_the_watchdog(monkeypatch, watchdog):
    monkeypatch.setenv("AGNMPI_WATCHDOG", watchdog)
    served = Served(4, kept=2)
    served.ask(3, WORK | PULL | SPARE)
    for worker in (0, 1):
        served.run()
        assert served.end.live == 3 - worker, "those who train, and the spare 2"
        served.ask(worker, LEAVE | PULL)
    served.run()
    assert (served.end.live, served.peers.sent) == (1, {})
    end = time.monotonic() + (1 if watchdog == "0" else 60)
    while served.end.live and time.monotonic() < end:
        served.run(1)
    assert (served.end.live, served.end.silent) == ((1, set()) if watchdog == "0" else (0, {2}))
    assert sorted(served.peers.sent) == ([] if watchdog == "0" else [0, 1, 3])


def test_the_end_waits_for_who_has_joined_no_longer_than_the_watchdog(monkeypatch):
    """Whether it has not left, or does not receive the final center."""
    monkeypatch.setenv("AGNMPI_WATCHDOG", "0.2")
    for leaves in (False, True):
        served, job = Served(1), Guest()
        assert served.end.admit(job) == 1
        job.hanging.add(0)
        if leaves:
            job.send(Commit(1, requests=LEAVE | PULL))
        served.run()
        served.ask(0, LEAVE | PULL)
        end = time.monotonic() + 60
        while served.end.live and time.monotonic() < end:
            served.run(1)
        served.run()
        assert (served.end.live, served.lost, sorted(served.peers.sent)) == (0, [1], [0])


class Guest(FakePeers):
    """The communicator with a rank of another job, which is worker 1."""

    def __init__(self):
        super().__init__(1)

    def send(self, commit):
        super().send(commit._replace(worker=0))

    def Improbe(self, source, tag, status):
        message = super().Improbe(source, tag, status)
        status.Set_source(0)
        return message

    def Isend(self, buffer, dest, tag):
        return super().Isend(buffer, dest + 1, tag)


def test_a_session_begins_anew_with_what_has_come_early():
    served = Served(2)
    served.end.stop_waiting_for(1)
    served.ask(0, LEAVE | PULL)
    served.run(1)
    assert served.end.live == 0
    served.end.open()
    assert (served.end.live, served.end.silent) == (1, {1})
    served.delta(0)
    served.ask(1)
    served.run()
    assert sorted(served.order[1:]) == [(0, 1), (1, 0)]
    assert served.end.live == 2


class Center:
    """What a worker's end talks to: it takes what is sent when it is let, and answers with an empty reply."""

    rank, size = 1, 1001

    def __init__(self):
        self.under_way, self.most, self.rooms, self.takes = 0, 0, [], False

    def Isend(self, buffer, dest, tag):
        if tag == DELTA:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        return Sent(self, tag == DELTA)

    def Irecv(self, buffer, source, tag):
        if isinstance(buffer, bytearray):
            self.rooms.append((id(buffer), len(buffer)))
            buffer[:] = Reply(5).encode().ljust(len(buffer), b"\0")
        return Sent(self, False)


class Sent:
    def __init__(self, center, counts):
        self.center, self.counts = center, counts

    def Test(self):
        if not self.center.takes:
            return False
        self.center.under_way -= self.counts
        return True


def test_a_worker_sends_few_pieces_at_a_time_into_one_room_for_replies():
    center = Center()
    end, x = P2PWorker(center), np.zeros(3 * IN_FLIGHT * PIECE, np.uint8)
    for sequence in (1, 2, 3):
        center.takes = False
        handle = end.exchange(Commit(0, sequence, payload=x), np.empty_like(x))
        for _ in range(3):
            assert not handle.test()
        center.takes = True
        assert handle.wait().clock == 5
    assert center.most == IN_FLIGHT
    assert len(set(center.rooms)) == 1
    assert center.rooms[0][1] == 80 + INLINE, "whatever the number of workers"
