"""Exchanges in a thread of their own."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi.cluster import setup as setups
from agnmpi.cluster.setup import Setup
from agnmpi.core.backoff import Backoff
from agnmpi.core.ends import Done, Elected, WorkerEnd
from agnmpi.core.messages import Commit, Reply
from agnmpi.recovery.resend import ResendingEnd
from agnmpi.transport import registry as transports
from agnmpi.transport.communication_thread import ThreadedEnd


class Slow:
    """A handle that is done when `release` is set; notes the thread that waits, and how it waits."""

    def __init__(self, end, clock):
        self.end, self.clock = end, clock

    def test(self):
        return self.end.release.is_set()

    def wait(self):
        self.end.threads.add(threading.get_ident())
        self.end.backoffs.append(Backoff())
        self.end.release.wait(60)
        if self.end.error is not None:
            raise self.end.error
        return Reply(self.clock)


class End(WorkerEnd):
    def __init__(self):
        self.calls, self.threads, self.backoffs = [], set(), []
        self.release, self.error = threading.Event(), None

    def begin(self, total, period, start):
        self.calls.append(("begin", threading.get_ident()))

    def exchange(self, commit, out):
        self.calls.append(commit.sequence)
        return Slow(self, commit.sequence)

    def pull(self, out):
        out[...] = 7
        return Done(Reply(0))

    def leave(self, commit, out):
        self.calls.append("leave")
        return Slow(self, 100)

    def close(self):
        self.calls.append("close")


def threaded():
    inner = End()
    return inner, ThreadedEnd(inner, np.zeros(1))


def communication_threads():
    return [thread for thread in threading.enumerate() if thread.name == "agnmpi communication"]


def test_exchanges_run_in_one_thread_in_order_while_the_caller_goes_on():
    inner, end = threaded()
    end.begin(10, 2, 0)
    first, second = end.exchange(Commit(0, 1), None), end.exchange(Commit(0, 2), None)
    leaving = end.leave(None, np.zeros(1))
    assert not first.test(), "it was started in the thread, and is not done"
    assert not second.test()
    inner.release.set()
    assert [second.wait().clock, first.wait().clock, leaving.wait().clock, first.wait().clock] == [2, 1, 100, 1]
    assert first.test()
    out = np.zeros(1)
    end.pull(out).wait()
    assert out[0] == 7
    end.close()
    assert inner.calls[0] == ("begin", threading.get_ident()), "collective calls come from the caller's thread"
    assert inner.calls[1:] == [1, 2, "leave", "close"]
    assert len(inner.threads) == 1
    assert threading.get_ident() not in inner.threads


def test_the_thread_neither_spins_nor_outlives_its_end():
    inner, end = threaded()
    before = len(communication_threads())
    inner.release.set()
    end.exchange(Commit(0, 1), None).wait()
    assert len(communication_threads()) == before + 1
    (backoff,) = inner.backoffs
    assert backoff.spin == 0
    assert Backoff().spin > 0, "of other threads"
    end.close()
    assert len(communication_threads()) == before
    end.close()


@pytest.mark.parametrize("error", [RuntimeError("10 commits in a row were refused"), Elected(), SystemExit(3)])
def test_what_ends_an_exchange_is_raised_where_the_worker_waits(error):
    inner, end = threaded()
    inner.error = error
    inner.release.set()
    handle = end.exchange(Commit(0, 1), None)
    with pytest.raises(type(error)) as raised:
        handle.wait()
    assert raised.value is error
    with pytest.raises(type(error)):
        handle.test()
    inner.error = None
    assert end.exchange(Commit(0, 2), None).wait().clock == 2, "the thread goes on"
    end.close()


def test_an_error_in_starting_an_exchange_is_raised_likewise():
    _inner, end = threaded()
    handle = end.pull(None)  # no memory to pull into
    with pytest.raises(TypeError):
        handle.wait()
    end.close()


@pytest.mark.parametrize(
    ("level", "caller_uses_mpi", "reason"),
    [
        (MPI.THREAD_MULTIPLE, True, ""),
        (MPI.THREAD_SERIALIZED, True, "MPI4PY_RC_THREAD_LEVEL=multiple"),
        (MPI.THREAD_SERIALIZED, False, ""),
        (MPI.THREAD_FUNNELED, False, "'funneled': set MPI4PY_RC_THREAD_LEVEL=serialized"),
    ],
)
def test_the_thread_level_decides_and_the_reason_says_what_helps(monkeypatch, level, caller_uses_mpi, reason):
    monkeypatch.setattr(setups, "fault_tolerant", lambda: False)
    monkeypatch.setattr("agnmpi.cluster.setup.MPI.Query_thread", lambda: level, raising=False)
    setup = Setup(transports.p2p(), overlap=True, caller_uses_mpi=caller_uses_mpi)
    assert reason in setup.unthreaded
    assert setup.threaded == (not reason)
    assert not setup._replace(overlap=False).threaded


@pytest.mark.parametrize(
    ("level", "caller_uses_mpi", "has_thread"),
    [
        (MPI.THREAD_SERIALIZED, False, True),
        (MPI.THREAD_SERIALIZED, True, False),
        (MPI.THREAD_MULTIPLE, False, False),
        (MPI.THREAD_MULTIPLE, True, False),
    ],
)
def test_where_ranks_may_die_no_two_threads_may_call_mpi(monkeypatch, level, caller_uses_mpi, has_thread):
    monkeypatch.setattr("agnmpi.cluster.setup.MPI.Query_thread", lambda: level, raising=False)
    monkeypatch.setattr(setups, "fault_tolerant", lambda: True)
    setup = Setup(transports.p2p(), overlap=True, caller_uses_mpi=caller_uses_mpi)
    assert setup.threaded == has_thread
    assert ("ULFM" in setup.unthreaded) == (not has_thread)


def test_where_all_exchange_together_there_is_no_thread(monkeypatch):
    monkeypatch.setattr("agnmpi.cluster.setup.MPI.Query_thread", lambda: MPI.THREAD_MULTIPLE, raising=False)
    monkeypatch.setattr(setups, "fault_tolerant", lambda: False)
    assert "allreduce" in Setup(transports.allreduce(), overlap=True).unthreaded


def test_a_lost_center_is_replaced_in_the_callers_thread_when_the_exchange_has_ended_in_its_own(monkeypatch):
    monkeypatch.setattr("agnmpi.recovery.resend.peer_failed", lambda _error: True)
    (first, end), (second, other) = threaded(), threaded()
    before, looked = len(communication_threads()), []

    def center_lost():
        looked.append(threading.current_thread())
        resending.replace(other)
        assert len(communication_threads()) == before, "that of the first end has ended"
        return False

    resending = ResendingEnd(end, SimpleNamespace(index=3), center_lost)
    handle = resending.exchange(Commit(5, 2), None)
    assert not handle.test()
    assert len(communication_threads()) == before + 1
    first.error = MPI.Exception(MPI.ERR_OTHER)
    first.release.set()
    second.release.set()
    assert handle.wait().clock == 2
    assert (first.calls, second.calls) == ([2], [2])
    assert looked == [threading.current_thread()]
    assert threading.get_ident() not in first.threads | second.threads
    resending.close()
    assert second.calls == [2, "close"]
