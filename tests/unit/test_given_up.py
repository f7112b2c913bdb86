"""One batch that always gives NaN costs its own steps, not the run; and who finds no work asks once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import UNEVEN, center, config, world
from launcher import PROBLEMS, events_of, result_of

from agnmpi import sgd
from agnmpi.cli.main import main
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.drive import drive, train
from agnmpi.core.leases import NONE, Lease, Leases
from agnmpi.core.messages import (
    CONTINUE,
    IDLE,
    LEAVE,
    NOT_FINITE,
    OK,
    PULL,
    REFUSED,
    STOP,
    WAIT,
    WORK,
    Commit,
)
from agnmpi.core.observer import Observer
from agnmpi.reporting import record
from agnmpi.simulation import simulate
from agnmpi.simulation.replay import replay
from agnmpi.simulation.timing import Timing
from agnmpi.transport.local import LocalCenter

BAD = f"{PROBLEMS}:OneBadSample"


def play(workers, total, bad, overlap=False, rule=None):
    """Workers in turn, a step each; the gradients of the steps in `bad` are NaN. Returns the center."""
    held, local, made = world(
        rule or rules.agn(), sgd(0.1), [0.0], workers, 2, total=total, overlap=overlap, begin=False
    )
    drive([train(worker, lambda step: (0.0, np.full(1, np.nan if step in bad else 1.0))) for worker in made])
    assert np.isfinite(local.c).all()
    return held


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rule", [rules.agn(), rules.aeasgd(0.5)], ids=["agn", "aeasgd"])
@pytest.mark.parametrize(("workers", "refused"), [(1, 15), (4, None)])
def test_steps_that_always_fail_are_given_up(workers, refused, overlap, rule):
    """Five periods among fifty, and they cost no worker: alone three tries each, among others two or three."""
    held = play(workers, 100, {3, 20, 21, 40, 77, 98}, overlap=overlap, rule=rule)
    leases = held.leases
    assert (held.steps, held.given_up, held.settled) == (90, 10, 100)
    assert (leases.committed, leases.given_up, leases.open()) == (90, 10, [])
    if not overlap or rule.pulls == "after":  # else a bad step spoils the exchange under way, too
        assert held.refused == refused if refused else 10 <= held.refused <= 15
    assert held.clock == 45


def test_a_run_goes_on_past_its_bad_sample(tmp_path, capsys):
    """As on the command line: four workers, five epochs, a sample that always gives NaN."""
    run = tmp_path / "run"
    options = ["--transport", "local", "--workers", "4", "--epochs", "5", "--batch", "4", "--period", "3"]
    assert main(["train", BAD, *options, "--rate", "0.05", "--run", str(run)]) == 0
    result = result_of(run)
    assert result["given_up"] == 5 * 3
    assert result["steps"] == 5 * 60 - 5 * 3
    assert result["metrics"]["distance"] < 0.5
    output = capsys.readouterr().out
    assert "gave NaN or infinity again and again" in output
    events = events_of(run)
    assert sum(event["steps"] for event in events if event["event"] == "given_up") == 15


def test_a_resumed_run_does_not_try_again_and_does_not_count_them(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--transport", "local", "--workers", "2", "--batch", "4", "--period", "3", "--rate", "0.05"]
    assert main(["train", BAD, *options, "--epochs", "2", "--run", str(run)]) == 0
    assert main(["train", BAD, "--resume", str(run), "--epochs", "3"]) == 0
    result = result_of(run)
    assert (result["steps"], result["given_up"]) == (3 * 60 - 9, 9)
    assert main(["train", BAD, "--resume", str(run), "--epochs", "3"]) == 0
    assert "the run was complete" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("total", [4, 100])
def test_where_nothing_is_finite_the_run_ends_with_the_reason(workers, total):
    with pytest.raises(RuntimeError, match=r"commits in a row were refused.*NaN or infinity"):
        play(workers, total, range(total))


def center_of(total, workers):
    held = Center(rules.agn(), np.zeros(1), workers)
    held.leases, held.idle_workers_wait = Leases(total, 2), True
    return held


def ask(held, worker, requests=WORK):
    return held.apply(Commit(worker, requests=requests, total=held.leases.total), np.zeros(1))


def commit(held, worker, sequence, lease, bad=False):
    flags = NOT_FINITE if bad else 0
    said = Commit(worker, sequence, lease.steps, lease.first, held.clock, requests=WORK, flags=flags)
    return held.apply(said._replace(payload=np.ones(1)), np.zeros(1))


def test_a_refused_lease_goes_to_another_worker_first():
    held = center_of(4, 2)
    first, second = ask(held, 0).work, ask(held, 1).work
    reply = commit(held, 0, 1, first, bad=True)
    assert (reply.status, reply.control, reply.work) == (REFUSED, WAIT, NONE), "it waits for the other to try"
    assert ask(held, 0, WORK | IDLE) is None
    assert held.waiting == {0}
    assert commit(held, 1, 1, second).work == first
    assert commit(held, 1, 2, first, bad=True).status == REFUSED
    assert held.given_up == 2
    reply = ask(held, 0, WORK | IDLE)
    assert (reply.control, reply.work, held.waiting) == (CONTINUE, NONE, set())


class GivenUp(Observer):
    def __init__(self):
        self.leases = []

    def given_up(self, lease):
        self.leases.append(lease)


def test_who_is_left_alone_tries_three_times():
    held = center_of(2, 2)
    held.observer = observer = GivenUp()
    lease = ask(held, 0).work
    held.patience = 2  # one period that fails is no divergence
    commit(held, 1, 1, Lease(0, 0), bad=True)
    for tries in range(3):
        assert observer.leases == []
        if tries == 2:
            with pytest.raises(RuntimeError, match="1 commits in a row"):  # there is no other work: all is given up
                commit(held, 0, tries + 1, lease, bad=True)
            continue
        commit(held, 0, tries + 1, lease, bad=True)
        lease = ask(held, 0, WORK | IDLE).work
    assert observer.leases == [Lease(0, 2)]


def test_a_waiting_worker_is_answered_once():
    """When work comes free, when all is committed, when the run is to stop, when a worker is lost."""
    for freed in ("lost", "left", "committed", "stopped"):
        held = center_of(4, 3)
        leases = [ask(held, worker).work for worker in (0, 1)]
        served = held.served
        assert ask(held, 2).control == WAIT, "without IDLE nobody is kept waiting: it may hold work"
        assert ask(held, 2, WORK | IDLE | PULL) is None
        assert ask(held, 2, WORK | IDLE | PULL) is None
        assert (held.served, held.waiting) == (served + 1, {2})
        commit(held, 0, 1, leases[0])
        if freed == "lost":
            held.worker_lost(1)
        elif freed == "left":
            ask(held, 1, LEAVE)
        elif freed == "committed":
            commit(held, 1, 1, leases[1])
        else:
            held.control = STOP
        reply = ask(held, 2, WORK | IDLE | PULL)
        assert reply.work == (leases[1] if freed in ("lost", "left") else NONE)
        assert reply.control == (STOP if freed == "stopped" else CONTINUE)
        assert held.waiting == set()


def test_a_local_center_answers_in_the_order_of_arrival():
    held = center_of(6, 5)
    local = LocalCenter(np.zeros(1), 5, held.apply)
    ends = [local.worker_end(i) for i in range(5)]
    work = [ends[i].exchange(Commit(i, requests=WORK, total=6), None).wait().work for i in range(3)]
    waits = [ends[i].exchange(Commit(i, requests=WORK | IDLE | PULL, total=6), np.empty(1)) for i in (4, 3)]
    assert local.serve_one(held.apply)
    assert local.serve_one(held.apply)
    assert not any(handle.test() for handle in waits)
    with pytest.raises(RuntimeError, match="waits for others"):
        waits[0].wait()
    ends[0].exchange(Commit(0, 1, 2, work[0].first, payload=np.ones(1)), None).wait()
    ends[1].exchange(Commit(1, requests=LEAVE), None).wait()
    assert [handle.test() for handle in waits] == [True, False]
    assert waits[0].wait().work == work[1]
    assert waits[0].out == 1, "c of that moment"
    ends[4].exchange(Commit(4, 1, 2, work[1].first, payload=np.ones(1)), None).wait()
    assert not waits[1].test()
    ends[2].exchange(Commit(2, 1, 2, work[2].first, payload=np.ones(1)), None).wait()
    assert waits[1].wait().work == NONE
    assert waits[1].out == 3


@pytest.mark.parametrize(
    "options", [{}, {"centers": 2}, {"rule": "aeasgd"}, {"overlap": True}, {"dylu": True}], ids=str
)
def test_in_virtual_time_each_step_is_taken_or_given_up(tmp_path, options):
    """A straggler holds the last work; the others ask once, and wait."""
    recorded = not options.keys() & {"centers", "overlap"}
    given = config(tmp_path / "run", 5, problem=BAD, batch=4, record=recorded, **options)
    result = simulate.run(given, Timing(**UNEVEN | {"speed_factors": "1,1,1,1,9"}))()
    assert result["steps"] + result["given_up"] == 8 * 60
    assert 8 <= result["given_up"] <= 8 * 3
    assert result["metrics"]["distance"] < 0.5
    if not recorded:
        return
    _, order = record.read(tmp_path / "run")
    served = list(order)
    for worker in range(5):
        kinds = [entry.kind for entry in served if entry.worker == worker]
        assert kinds.count("ask") <= 8, "one at the beginning, and one for each time that it waited"
    again = replay(tmp_path / "run", config(tmp_path / "again", 5, problem=BAD, batch=4, **options))()
    assert again["same_bits"] is True
    assert center(tmp_path / "again") == center(tmp_path / "run")


@given(st.data())
def test_whatever_is_refused_each_step_is_committed_or_given_up(data):
    """Periods of any length, commits of a part, workers that leave; bad steps fail whoever takes them."""
    total, workers = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    bad = data.draw(st.sets(st.integers(0, total - 1), max_size=4))
    pace = data.draw(st.sampled_from([None, lambda worker, _steps: worker + 1]))
    book, held, committed = Leases(total, 3, pace), {w: [] for w in range(workers)}, []
    given_up, turns = [], 0
    while True:
        turns += 1
        assert turns < 5000
        worker = data.draw(st.integers(0, workers - 1)) if turns < 60 else turns % workers
        if not held[worker]:
            lease = book.grant(worker, skip_failed=turns < 60 and data.draw(st.booleans()))
            if lease.steps:
                held[worker].append(lease)
            elif not any(held.values()) and not book.free:
                break
            continue
        lease = held[worker].pop()
        done = lease._replace(steps=data.draw(st.integers(1, lease.steps))) if turns < 60 else lease
        steps = range(done.first, done.first + done.steps)
        if turns < 60 and data.draw(st.integers(0, 5)) == 0:
            book.release_all(worker)
            held[worker] = []
            continue
        if done.steps < lease.steps:  # the rest stays the worker's
            held[worker].append(Lease(steps.stop, lease.steps - done.steps))
        if bad & set(steps):
            if book.refuse(worker, done):
                given_up += steps
        else:
            book.commit(worker, done)
            committed += steps
    assert sorted(committed + given_up) == list(range(total))
    assert bad <= set(given_up)
    assert (book.committed, book.given_up) == (len(committed), len(given_up))
    again = Leases(total, 3)
    again.restore(book.state())
    assert (again.grant(0), again.committed, again.given_up) == (NONE, book.committed, book.given_up)


def test_a_reply_does_not_grow_with_the_workers():
    for workers in (2, 1000):
        held = center_of(8, workers)
        reply = ask(held, 0, WORK | PULL)
        assert (reply.applied, reply.snapshot, reply.status) == ((), None, OK)
        held.replicates_state = True
        assert len(ask(held, 0, WORK | PULL).applied) == workers


def test_a_run_of_misfits_ends_with_the_reason():
    center, c = Center(rules.agn(), np.zeros(10), 1, patience=3), np.zeros(10)
    center.leases = Leases(40, 3)
    lease, firsts = center.leases.grant(0), []

    def misfit():
        return Commit(0, 1, lease.steps, lease.first, requests=WORK, nbytes=88).received_from(0, [80])

    for _ in range(2):
        reply = center.apply(misfit(), c)
        firsts.append(lease.first)
        lease = reply.work
        assert reply.status == REFUSED
    assert [*firsts, lease.first] == [0, 3, 6], "others come first"
    with pytest.raises(RuntimeError, match="no commit to this model: 88 bytes, the center has 80"):
        center.apply(misfit(), c)
    with pytest.raises(ValueError, match="worker 0 announces -8 bytes"):
        Commit(0, 1, nbytes=-8).received_from(0, [80])


def test_a_worker_that_fails_at_once_does_not_end_the_run_before_the_others_have_come():
    held = Center(rules.agn(), np.zeros(1), 2)
    held.leases = Leases(None, 2)

    def asks(worker, requests=WORK):
        return held.apply(Commit(worker, requests=requests, total=-1), np.zeros(1)).work

    lease = asks(0)
    for sequence in range(1, 21):
        lease = commit(held, 0, sequence, lease, bad=True).work
    asks(1)
    lease = commit(held, 0, 21, lease, bad=True).work
    asks(1, LEAVE)
    with pytest.raises(RuntimeError, match="22 commits in a row were refused, the last from worker 0"):
        commit(held, 0, 22, lease, bad=True)
