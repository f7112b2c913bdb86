import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnmpi.core.batches import Permutation, Plan
from agnmpi.core.division import rounds
from agnmpi.core.leases import NONE, Lease, Leases


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3), st.integers(0, 5))
def test_every_sample_of_an_epoch_once(samples, batch, epochs, seed):
    plan = Plan(samples, batch, epochs, seed=seed)
    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.indices(first + t) for t in range(plan.steps_per_epoch)])
        assert sorted(seen) == list(range(samples))
    assert plan.count(Lease(0, plan.steps)) == samples * epochs


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 40), st.integers(0, 40))
def test_count_is_the_number_of_indices(samples, batch, first, steps):
    plan = Plan(samples, batch, 1)
    assert plan.count(Lease(first, steps)) == sum(len(plan.indices(t)) for t in range(first, first + steps))


def test_epochs_differ_seeds_differ_and_repeat():
    a, b, c = Plan(50, 50, 2, seed=1), Plan(50, 50, 2, seed=1), Plan(50, 50, 2, seed=2)
    assert (a.indices(0) == b.indices(0)).all()
    assert (a.indices(0) != a.indices(1)).any()
    assert (a.indices(0) != c.indices(0)).any()


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_permutation_is_a_bijection_whatever_the_size(size, seed, epoch):
    order = Permutation(size, (seed, epoch))(range(size))
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 7, 16, 30])
def test_each_sample_is_as_often_the_first(size):
    keys = 1500
    for position in (0, size - 1):
        seen = [Permutation(size, (seed, 0))(range(position, position + 1))[0] for seed in range(keys)]
        counts, mean = np.bincount(seen, minlength=size), keys / size
        chi = ((counts - mean) ** 2 / mean).sum()
        assert chi < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_the_order_of_a_billion_samples_needs_no_memory():
    plan = Plan(10**9, 128, 2, seed=3)
    first, last = plan.indices(0), plan.indices(plan.steps_per_epoch - 1)
    assert (len(first), len(last)) == (128, 128)
    assert len({*first, *last}) == 256
    assert 0 <= min(first) < max(first) < 10**9
    assert 4e8 < first.mean() < 6e8
    assert (plan.indices(plan.steps_per_epoch) != first).any()


def test_plan_refuses_nonsense():
    for bad in ({"samples": 0}, {"batch": 0}, {"epochs": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"samples|batch|steps"):
            Plan(**({"samples": 10, "batch": 2, "epochs": 1} | bad))


@given(st.integers(0, 80), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32))
def test_leases_cover_the_run_once_whatever_happens(total, period, workers, most, seed):
    """Workers take, commit, commit in part, and vanish, at random; each step is committed once all the same."""
    draw = random.Random(seed)
    book = Leases(total, period)
    held = {w: [] for w in range(workers)}
    committed = []
    vanished = 0
    while True:
        worker = draw.randrange(workers)
        act = draw.choice(["take", "commit", "part", "vanish"])
        if act == "take" or not held[worker]:
            lease = book.grant(worker, periods=draw.randint(1, most))
            assert lease.steps <= most * period
            if lease.steps:
                held[worker].append(lease)
            elif not any(held.values()):
                break
        elif act == "vanish" and vanished < 10:
            vanished += 1
            book.release_all(worker)
            held[worker] = []
        else:
            lease = held[worker].pop(0)
            done = Lease(lease.first, draw.randint(0, lease.steps) if act == "part" else lease.steps)
            book.commit(worker, done)
            committed += range(done.first, done.first + done.steps)
            if done.steps < lease.steps:  # the rest stays the worker's
                held[worker].append(Lease(done.first + done.steps, lease.steps - done.steps))
    assert sorted(committed) == list(range(total))
    assert book.committed == total
    assert book.grant(0) == NONE


def test_a_lease_of_another_worker_cannot_be_committed():
    book = Leases(10, 5)
    lease = book.grant(0)
    with pytest.raises(ValueError, match="worker 1 commits"):
        book.commit(1, lease)


@given(st.integers(0, 100), st.integers(1, 7), st.integers(1, 8))
def test_rounds_are_equally_many_and_cover_the_run(total, period, workers):
    everyone = [list(rounds(total, period, w, workers)) for w in range(workers)]
    assert len({len(leases) for leases in everyone}) == 1
    taken = [t for leases in everyone for lease in leases for t in range(lease.first, lease.first + lease.steps)]
    assert sorted(taken) == list(range(total))
    for leases in zip(*everyone):
        assert max(x.steps for x in leases) - min(x.steps for x in leases) <= 1
        assert max(x.steps for x in leases) <= period
