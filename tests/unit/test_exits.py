"""Signals that ask a run to stop, in the process that trains and in those that it forks."""

import os
import signal
import threading

import pytest

from agnmpi.training.exits import Signals

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def signals():
    aborted = []
    signals = Signals(aborted.append)
    before = [signal.getsignal(number) for number in NUMBERS]
    signals.install()
    yield signals, aborted
    signals.remove()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def in_a_child(call):
    """The exit code of a forked process: what `call()` returns; negative: ended by a signal."""
    child = os.fork()
    if not child:
        os._exit(call())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_ends_at_TERM_and_not_at_USR1(signals):
    def meets():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert in_a_child(meets) == -signal.SIGTERM
    thread_found = []
    thread = threading.Thread(target=lambda: thread_found.append(in_a_child(meets)))
    thread.start()
    thread.join()
    assert thread_found == [-signal.SIGTERM], "forked by a thread, as a pool does"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signals[0].received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals[0].received == "SIGTERM"


def test_without_our_handlers_a_fork_changes_nothing():
    before = signal.getsignal(signal.SIGUSR1)
    assert in_a_child(lambda: int(signal.getsignal(signal.SIGUSR1) is not before)) == 0


def test_a_second_signal_aborts_but_not_what_is_one_press(signals, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("agnmpi.training.exits.time.monotonic", lambda: clock[0])
    signals, aborted = signals
    for clock[0] in (5.0, 5.1, 5.9):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.received == "SIGUSR1"
    assert not aborted
    clock[0] = 6.5
    signals.over()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not aborted, "all work is done"
    os.kill(os.getpid(), signal.SIGTERM)
    assert aborted == [128 + signal.SIGTERM]


def test_after_the_end_a_signal_is_ignored(signals):
    signals, _ = signals

    def meets():
        signals.install()
        signals.release()
        os.kill(os.getpid(), signal.SIGUSR1)
        return 5

    assert in_a_child(meets) == 5
