"""The parts of in-situ training that need no ranks: the reservoir, the driver that never blocks, weights by samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import world

from agnmpi import sgd
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.drive import Unblocking
from agnmpi.core.leases import Leases
from agnmpi.frameworks import insitu_center
from agnmpi.frameworks.budget import Budget
from agnmpi.frameworks.insitu_center import Resting
from agnmpi.frameworks.samples import Reservoir
from agnmpi.transport.local import LocalCenter


@given(st.integers(1, 20), st.lists(st.integers(0, 30), max_size=8), st.integers(0, 99))
def test_a_reservoir_holds_pairs_that_came_each_once(capacity, puts, seed):
    reservoir, at = Reservoir(capacity, np.random.default_rng(seed)), 0
    for count in puts:
        numbers = np.arange(at, at + count, dtype=float)
        reservoir.put(numbers, -numbers)
        numbers[:] = np.nan  # what is kept was copied
        at += count
    assert (reservoir.seen, len(reservoir)) == (at, min(at, capacity))
    if at:
        x, y = reservoir.batch(400)
        assert (x == -y).all()
        assert set(x) <= set(range(at))
        assert len(set(x)) <= capacity


@pytest.mark.parametrize("piece", [7, 100])
def test_a_reservoir_is_uniform_over_all_that_came(piece):
    """Each of 100 numbers is held with probability 1/4, in whatever pieces they come."""
    held = np.zeros(100)
    for seed in range(600):
        reservoir = Reservoir(25, np.random.default_rng(seed))
        for at in range(0, 100, piece):
            numbers = np.arange(at, min(at + piece, 100))
            reservoir.put(numbers, numbers)
        held[np.unique(reservoir.batch(300)[0])] += 1
    deviation = (600 * 0.25 * 0.75) ** 0.5
    assert abs(held - 150).max() < 5 * deviation
    assert held.std() == pytest.approx(deviation, rel=0.3)


def test_a_reservoir_is_uniform_over_a_long_stream():
    """Of 100,000 numbers in one put, and of as many in many, all places alike are held."""
    for pieces in (1, 1000):
        reservoir = Reservoir(2000, np.random.default_rng(0))
        for numbers in np.split(np.arange(100_000.0), pieces):
            reservoir.put(numbers, numbers)
        held = set(reservoir.batch(40_000)[0])
        assert len(held) == 2000
        counts = np.histogram(list(held), 10, (0, 100_000))[0]
        assert abs(counts - 200).max() < 5 * 200**0.5


def test_samples_that_do_not_fit_are_refused():
    reservoir = Reservoir(5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="the reservoir is empty"):
        reservoir.batch(1)
    with pytest.raises(ValueError, match=r"not shapes \(2, 3\) and \(3,\)"):
        reservoir.put(np.zeros((2, 3)), np.zeros(3))
    reservoir.put(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match=r"samples x had shape \(3,\), and have \(4,\) now"):
        reservoir.put(np.zeros((2, 4)), np.zeros(2))


@given(st.floats(0.01, 0.9), st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 2)), min_size=1, max_size=50))
def test_steps_use_no_more_than_their_share_and_the_last_of_them(share, calls):
    now = 0.0
    budget, used, longest = Budget(lambda: now), 0.0, 0.0
    for passed, cost in calls:
        now += passed
        turn = budget.grant(share)
        while turn and budget.allows_step():
            with budget.step():
                now += cost
            used, longest = used + cost, max(longest, cost)
        if turn:
            budget.end_turn()
        assert used <= share * now + longest + 1e-9


@pytest.mark.parametrize("agree", [False, True])
def test_ranks_that_call_equally_often_train_in_the_same_calls(agree):
    """Steps of 2 and 3 ms at 2 % of calls of 10 ms: turns are rare, and no rank has one where the slower has none."""
    now = [0.0, 0.0]
    budgets = [Budget(lambda i=i: now[i]) for i in range(2)]
    turns, steps = [[], []], [0, 0]
    for call in range(4096):
        for i, (budget, cost) in enumerate(zip(budgets, (0.002, 0.003))):
            now[i] += 0.01
            if budget.grant(0.02):
                turns[i].append(call)
                while budget.allows_step():
                    with budget.step():
                        now[i] += cost
                    steps[i] += 1
                now[i] += 1e-4  # for messages
                budget.end_turn()
            if agree and call % 8 == 0:
                budget.agreed = max(each.wanted for each in budgets)
    late = [{call for call in each if call > 256} for each in turns]
    assert late[1] <= late[0]
    assert late[0] == late[1] or not agree
    assert len(late[0]) <= 4096 / 32
    assert steps == pytest.approx([0.02 * now[0] / 0.002, 0.02 * now[1] / 0.003], rel=0.05)


@pytest.mark.parametrize(("messages", "kept"), [(0.0, 1.0), (0.02, None), (0.2, 0.5)])
def test_messages_are_paid_from_half_of_the_budget_at_most(messages, kept):
    """A tenth of calls of 10 ms for steps of 1 ms; each turn takes so long beside them."""
    now = stepped = beside = 0.0
    budget = Budget(lambda: now)
    for _ in range(5000):
        now += 0.01
        if budget.grant(0.1):
            while budget.allows_step():
                with budget.step():
                    now += 0.001
                stepped += 0.001
            now += messages
            beside += messages
            budget.end_turn()
    granted = 0.1 * now
    if kept is None:  # there is enough for both
        assert stepped + beside == pytest.approx(granted, rel=0.05)
        assert beside > 0.1 * granted
    else:
        assert stepped == pytest.approx(kept * granted, rel=0.05)


def test_a_turn_comes_also_where_calls_have_become_slow():
    now = 0.0
    budget, turns = Budget(lambda: now), []
    for call in range(1100):
        now += 1e-4 if call < 1000 else 10.0
        turns.append(budget.grant(0.02))
        while turns[-1] and budget.allows_step():
            with budget.step():
                now += 0.01
        if turns[-1]:
            budget.end_turn()
    assert sum(turns[:1000]) < 20
    assert all(turns[1001:])


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 60), st.booleans(), st.integers(0, 999), st.integers(0, 80))
def test_workers_that_never_wait_take_each_step_once(workers, period, total, overlap, seed, leave_after):
    """Whatever the order in which workers are called and the center serves, and whenever they are told to leave."""
    center, local, made = world(
        rules.agn(), sgd(0.1), [0.0], workers, period, total=total, overlap=overlap, begin=False
    )
    center.idle_workers_wait = True
    draw, training, taken = np.random.default_rng(seed), [Unblocking(worker) for worker in made], 0
    for turn in range(10_000):
        i = int(draw.integers(workers + 1))
        if i == workers:
            local.serve_one(center.apply)
        elif training[i].is_due():
            training[i].step(np.full(1, -1.0), 0.5)
            taken += 1
        if turn == leave_after * workers:
            for each in training:
                each.leave()
        if all(each.left for each in training):
            break
    assert all(each.left for each in training)
    assert center.steps == taken <= total


def resting(workers, period, total):
    """A center in this process, and workers that give back the steps that they do not take."""
    center = Center(rules.agn(), np.zeros(1), workers)
    center.leases, center.idle_workers_wait = Leases(total, period), True
    local, training = LocalCenter(np.zeros(1), workers, center.apply), []
    for i in range(workers):
        worker = Resting(np.zeros(1), rules.agn(), sgd(0.1), local.worker_end(i), i, wait=False)
        worker.total = total
        training.append(Unblocking(worker))
    return center, local, training


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 60), st.integers(0, 999), st.integers(0, 80))
def test_workers_that_give_back_steps_take_each_once(workers, period, total, seed, leave_after):
    """Whenever they are told to rest, to look whether all steps are taken, or to leave."""
    center, local, training = resting(workers, period, total)
    draw, taken = np.random.default_rng(seed), 0
    for turn in range(10_000):
        for each in training if turn == leave_after * workers else ():
            each.worker.leaves = True
            each.leave()
        i, what = int(draw.integers(workers + 1)), draw.integers(5)
        if i == workers:
            local.serve_one(center.apply)
            continue
        worker = training[i].worker
        worker.rests |= what == 1
        worker.look() if what == 2 else None
        worker.ready = bool(what > 2)
        if training[i].is_due():
            assert worker.ready
            training[i].step(np.full(1, -1.0), 0.5)
            taken += 1
        worker.ready = False
        if all(each.left for each in training):
            break
    assert all(each.left for each in training)
    assert center.steps == taken <= total


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_worker_that_takes_no_steps_leaves_them_to_the_other(taken, monkeypatch):
    """The first takes so many of 20, in periods of 2, and no more; it has none of them when the other is done."""
    monkeypatch.setattr(insitu_center, "RESTS_AFTER", 1e-9)
    center, local, training = resting(2, 2, 20)
    for turn in range(1000):
        for i, each in enumerate(training):
            each.worker.ready = i == 1 or taken > 0
            if each.is_due():
                each.step(np.full(1, -1.0))
                taken -= i == 0
            each.worker.ready = False
        if turn > 20:
            training[0].worker.look()
        while local.serve_one(center.apply):
            pass
    assert training[1].finished
    assert center.steps == 20
    assert not center.leases.held


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("speeds", "samples", "targets", "rate"),
    [
        ((3, 1), (1, 1), (1, 0), 0.03),
        ((1, 3), (1, 1), (1, 0), 0.03),
        ((10, 5, 1, 1), (1, 1, 1, 1), (0, 1, 2, 3), 0.01),
    ],
)
def test_weights_by_samples_take_out_the_speeds(speeds, samples, targets, rate, overlap):
    """The center rests at the mean over all samples; without weights it rests near the fastest worker."""

    def rest(rule):
        _, local, workers = world(rule, sgd(rate), [0.0], len(speeds), 10, overlap=overlap)
        seen = []
        for turn in range(600):
            for worker, speed, count, target in zip(workers, speeds, samples, targets):
                worker.samples = count
                for _ in range(speed):
                    worker.step(worker.x - target)
            seen += [local.c[0]] * (turn >= 400)
        return np.mean(seen)

    optimum, by_speed = np.average(targets, weights=samples), np.average(targets, weights=speeds)
    assert rest(rules.agn()) == pytest.approx(by_speed, abs=0.06)
    assert rest(rules.weighted(rules.agn(), rules.by_samples(1.0, 10))) == pytest.approx(optimum, abs=0.06)
