"""Who still runs, and what a rank does that waits for one that does not."""

import os
import signal
import threading

import pytest
from conditions import until

from agnmpi.core import backoff
from agnmpi.core.backoff import Backoff, limit, wait_until
from agnmpi.recovery.processes import Process, command
from agnmpi.recovery.watchdog import Watchdog, calling


class Ended(Exception):
    pass


def end(why):
    raise Ended(why)


def asleep():
    """A child of this process that sleeps."""
    child = os.fork()
    if not child:
        signal.pause()
    return Process.this()._replace(pid=child, started=started(child))


@pytest.fixture
def dead():
    """A process that has ended, and whose parent knows."""
    process = asleep()
    assert not process.is_gone
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_gone, "a zombie"
    os.waitpid(process.pid, 0)
    assert process.is_gone
    return process


def started(pid):
    """When a process started, by `ps`' own source."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return int(file.read().rpartition(")")[2].split()[19])


def test_processes(dead):
    this = Process.this()
    assert not this.is_gone
    assert this._replace(started=this.started - 1).is_gone, "another has its pid now"
    assert not dead._replace(namespace="another machine").is_gone, "not known"
    assert command(os.getpid())
    assert command(dead.pid) == ""


def test_a_wait_for_the_dead_ends(dead):
    Watchdog([Process.this(), dead], lambda: [0, 1], 0.5, end).start()
    with pytest.raises(Ended, match=rf"has waited for \d+ s, and rank 1, process {dead.pid}, has ended"):
        wait_until(lambda: False)
    turns = iter(range(1300))
    Watchdog([Process.this(), dead], lambda: [0], 0.5, end).start()
    wait_until(lambda: next(turns) > 1200)  # of 1 ms or more: whom it waits for is alive


def test_a_call_that_waits_for_the_dead_ends(dead):
    said, ended = [], threading.Event()
    dog = Watchdog([Process.this(), dead], list, 0.1, lambda why: (said.append(why), ended.set()))
    dog.start()
    with calling("MPI_Comm_shrink", [0, 1]):
        assert ended.wait(30)
    assert said[0] == f"has been in MPI_Comm_shrink for more than 0.1 s, and rank 1, process {dead.pid}, has ended"
    said.clear()
    with calling("MPI_Comm_shrink", [0]):
        assert not threading.Event().wait(1.5)
    assert not said


def test_a_call_that_waits_for_the_stopped_kills_it(capsys):
    process = asleep()
    assert not process.is_stopped
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert process.is_stopped
    assert not process._replace(namespace="another machine").is_stopped, "not known"
    Watchdog([Process.this(), process], list, 1.0, end).start()
    with calling("MPI_Comm_shrink", [0, 1]):
        until(lambda: process.is_gone, "it is not killed")
    assert os.WTERMSIG(os.waitpid(process.pid, 0)[1]) == signal.SIGKILL
    assert "rank 1 is stopped, and holds up MPI_Comm_shrink: it is killed" in capsys.readouterr().err


def test_the_limit(monkeypatch):
    monkeypatch.delenv("AGNMPI_WATCHDOG", raising=False)
    assert limit() == 60
    monkeypatch.setenv("AGNMPI_WATCHDOG", "2.5")
    assert limit() == 2.5
    for text in ("-1", "nan", "inf", "long"):
        monkeypatch.setenv("AGNMPI_WATCHDOG", text)
        with pytest.raises(ValueError, match="AGNMPI_WATCHDOG must be a number of seconds"):
            limit()


@pytest.mark.parametrize(("longest", "last", "looks"), [(0.0, 1e-3, 450), (5e-3, 5e-3, 180)])
def test_the_longer_nothing_comes_the_more_seldom_one_looks(monkeypatch, longest, last, looks):
    """In 0.4 s; no sleep is more than an eighth of the time so far, none beyond the cap more than a 32nd."""
    now, slept = [10.0], []

    def sleep(seconds):
        slept.append((seconds, now[0] - 10))
        now[0] += seconds + 60e-6  # until it runs again

    monkeypatch.setattr(backoff.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(backoff.time, "sleep", sleep)
    monkeypatch.setattr(backoff.os, "sched_yield", lambda: sleep(0))
    waits = Backoff(longest=longest)
    while now[0] < 10.4:
        waits.wait()
    assert len(slept) < looks
    assert slept[-1][0] == last
    assert all(seconds <= idle / 8 for seconds, idle in slept)
    assert all(seconds <= max(1e-3, idle / 32) for seconds, idle in slept)
