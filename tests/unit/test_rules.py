"""One proof for every rule, over the local transport."""

import numpy as np
import pytest
from golden import ONE_WORKER, TWO_WORKERS, close
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import follow_golden, world

from agnmpi import nesterov, sgd
from agnmpi.core import rules
from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.rules import RULES, CommitInfo

ALPHA = 0.25


def make_rule(name):
    return RULES[name](ALPHA) if name in ("aeasgd", "eamsgd") else RULES[name]()


def is_collective(name):
    return make_rule(name).allreduce


@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker(case):
    follow_golden(case)


@pytest.mark.parametrize("case", TWO_WORKERS)
def test_golden_two_workers(case):
    rule, optimizer, start, turns = TWO_WORKERS[case]
    _, local, workers = world(rule, optimizer, start, 2)
    for i, x, c in turns:
        workers[i].step(-np.ones(len(start)))
        close(workers[i].x, x)
        close(local.c, c)


@pytest.mark.parametrize("name", ["agn", "downpour", "dynsgd", "synchronous"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_and_period_one_is_the_local_optimizer(name, optimizer):
    gradient = lambda x: np.sin(3 * x) + x  # noqa: E731
    alone = np.linspace(-2, 2, 5)
    optimizer = OPTIMIZERS[optimizer](0.05)
    state = optimizer.init(alone)
    _, local, (worker,) = world(make_rule(name), optimizer, alone)
    for _ in range(30):
        state = optimizer.update(gradient(alone), state, alone)
        worker.step(gradient(worker.x))
        np.testing.assert_allclose(worker.x, alone, rtol=1e-12)
        np.testing.assert_allclose(local.c, alone, rtol=1e-12)


def test_gradient_variant_equals_displacement_for_plain_sgd():
    rng = np.random.default_rng(0)
    centers = []
    for variant in ("displacement", "gradient"):
        center_optimizer = sgd(0.1) if variant == "gradient" else None
        _, local, workers = world(rules.agn(variant), sgd(0.1), np.ones(3), 2, 4, center_optimizer=center_optimizer)
        rng = np.random.default_rng(0)
        for _ in range(12):
            for worker in workers:
                worker.step(worker.x + rng.normal(size=3))
        centers.append(local.c)
    np.testing.assert_allclose(*centers, rtol=1e-12)


ETA, BETA = 0.1, 0.8
# One local step on f = x²/2, as a linear map of (x, m, c).
LOCAL_STEPS = {
    "aeasgd": (sgd(ETA), [[1 - ETA, 0, 0], [0, 1, 0], [0, 0, 1]]),
    # m ← βm + x, x ← x − η(x + βm)
    "eamsgd": (nesterov(ETA, BETA), [[1 - ETA - ETA * BETA, -ETA * BETA**2, 0], [1, BETA, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("name", LOCAL_STEPS)
def test_elastic_follows_its_closed_form_on_a_quadratic(name, period):
    """After each period d = α(x − c), x −= d, c += d; the momentum is kept."""
    optimizer, local_step = LOCAL_STEPS[name]
    _, local, (worker,) = world(make_rule(name), optimizer, [4.0], period=period)
    exchange = np.array([[1 - ALPHA, 0, ALPHA], [0, 1, 0], [ALPHA, 0, 1 - ALPHA]])
    expected = np.array([4.0, 0.0, 4.0])
    for t in range(1, 40):
        worker.step(worker.x.copy())
        expected = local_step @ expected
        if t % period == 0:
            expected = exchange @ expected
        np.testing.assert_allclose([worker.x[0], local.c[0]], expected[[0, 2]], rtol=1e-10)


def test_nesterov_follows_its_closed_form_on_a_quadratic():
    """f = x²/2: (x, m) ↦ A(x, m), so that x after t steps is (Aᵗ(x₀, 0))₁; with one worker AGN changes nothing."""
    _, local, (worker,) = world(rules.agn(), nesterov(ETA, BETA), [2.0])
    a = np.array(LOCAL_STEPS["eamsgd"][1])[:2, :2]
    for t in range(1, 40):
        worker.step(worker.x.copy())
        expected = (np.linalg.matrix_power(a, t) @ [2.0, 0.0])[0]
        np.testing.assert_allclose([worker.x[0], local.c[0]], expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["aeasgd", "eamsgd"])
@pytest.mark.parametrize("overlap", [False, True])
def test_elastic_exchanges_conserve_x_plus_c(name, overlap):
    rng = np.random.default_rng(0)
    center, local, workers = world(make_rule(name), None, rng.normal(size=4), 3, 1, overlap=overlap)
    total = local.c + sum(w.x for w in workers)
    for _ in range(50):
        worker = workers[rng.integers(3)]
        move = rng.normal(size=4)
        worker.x += move
        total += move
        worker.step(None)
    for worker in workers:  # exchanges under way
        worker.finish_exchange()
    assert center.clock == 50
    np.testing.assert_allclose(local.c + sum(w.x for w in workers), total, rtol=1e-12)


def test_diloco_follows_its_closed_form_on_a_quadratic():
    """k SGD steps shrink x by q = (1−η)^k; the center takes Nesterov(0.7, 0.9) on the gradient (1 − q)c."""
    eta, k = 0.1, 5
    _, local, (worker,) = world(rules.diloco(), sgd(eta), [3.0], 1, k, center_optimizer=nesterov(0.7, 0.9))
    c, m, q = 3.0, 0.0, (1 - eta) ** k
    for _ in range(20):
        for _ in range(k):
            worker.step(worker.x.copy())
        g = (1 - q) * c
        m = 0.9 * m + g
        c -= 0.7 * (g + 0.9 * m)
        np.testing.assert_allclose([local.c[0], worker.x[0]], [c, c], rtol=1e-10)


@pytest.mark.parametrize(("name", "workers"), [(n, w) for n in RULES for w in (1, 3) if w == 1 or not is_collective(n)])
def test_every_rule_converges(name, workers):
    """Collective rules with several workers: tests/mpi/test_allreduce.py."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=5)
    center_optimizer = nesterov(0.7, 0.9) if name == "diloco" else None
    _, local, made = world(make_rule(name), sgd(0.05), np.zeros(5), workers, 3, center_optimizer=center_optimizer)
    for _ in range(600):
        for worker in made:
            worker.step(worker.x - target)
    np.testing.assert_allclose(local.c, target, atol=1e-3)


def test_weights_at_the_center():
    assert [rules.dynsgd().weight(CommitInfo(s)) for s in (0, 1, 3)] == [1, 0.5, 0.25]
    assert rules.synchronous().weight(CommitInfo(0, 4)) == rules.diloco().weight(CommitInfo(0, 4)) == 0.25
    commit = CommitInfo(7, workers=3)
    assert rules.agn().weight(commit) == rules.downpour().weight(commit) == rules.aeasgd(0.1).weight(commit) == 1


def test_dynsgd_weighs_by_the_staleness_that_the_center_sees():
    center, local, workers = world(rules.dynsgd(), None, [0.0], 3)
    for worker in workers:  # all pulled at clock 0, so their staleness is 0, 1, 2
        worker.x += 6
        worker.step(None)
    close(local.c, [6 + 3 + 2])
    assert (center.staleness_max, center.staleness_mean) == (2, 1.0)


def test_the_last_period_is_divided_by_its_own_length():
    center, local, (worker,) = world(rules.agn(), sgd(1.0), [0.0], 1, 4, total=6, begin=False)
    numbers = []
    for number in worker.steps():
        numbers.append(number)
        worker.step(-np.ones(1) * (1 if number < 4 else 5))
    assert numbers == [0, 1, 2, 3, 4, 5]
    close(local.c, [4 / 4 + 10 / 2])
    assert (center.clock, center.steps, center.leases.committed) == (2, 6, 6)


def test_leaving_early_commits_what_is_done_and_gives_back_the_rest():
    center, local, workers = world(rules.agn(), sgd(1.0), [0.0], 2, 4, total=12, begin=False)
    first = workers[0].steps()
    for number in first:
        workers[0].step(-np.ones(1))
        if number == 1:
            break
    first.close()
    workers[0].settle()
    close(local.c, [1.0])
    assert center.steps == 2
    numbers = []
    for number in workers[1].steps():
        numbers.append(number)
        workers[1].step(-np.ones(1))
    assert sorted(numbers) == list(range(2, 12))


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.sampled_from(["agn", "downpour", "aeasgd"]),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_random_interleavings_apply_each_commit_once(order, name, period):
    center, _, workers = world(make_rule(name), sgd(1.0), np.zeros(2), 4, period)
    for i in order:
        workers[i].step(-np.ones(2))
    assert center.applied == [w.sequence for w in workers] == [order.count(i) // period for i in range(4)]
    assert center.clock == sum(center.applied)
    assert center.steps == period * center.clock


def test_overlap_applies_in_this_order():
    """Exact values of one worker, SGD(1), gradient −1, AGN λ = 2, the exchange of period k during k + 1."""
    center, local, (worker,) = world(rules.agn(), sgd(1.0), [0.0], 1, 2, overlap=True)
    g = -np.ones(1)

    def serve():
        assert local.serve_one(center.apply)

    worker.step(g), worker.step(g)  # x = 2; commit (2 − 0)/2 = 1 is on its way
    close([worker.x[0], local.c[0], center.clock], [2, 0, 0])
    worker.step(g)  # still on its way: x goes on from where it was
    close([worker.x[0], local.c[0]], [3, 0])
    serve()  # the center applies it; the worker has not looked yet
    close([worker.x[0], local.c[0], worker.clock], [3, 1, 0])
    worker.step(g)  # x = 4, the period is full: first x ← c + (x − sent) = 1 + (4 − 2) = 3, then commit (3 − 1)/2
    close([worker.x[0], worker.o[0], worker.clock], [3, 1, 1])
    serve()
    close([local.c[0], center.clock], [2, 2])
    worker.step(g)  # x = 4; the answer is there: x ← 2 + (4 − 3)
    close([worker.x[0], worker.o[0], worker.clock], [3, 2, 2])
    worker.step(g)  # x = 4; commit (4 − 2)/2 = 1
    serve()
    close([worker.x[0], local.c[0]], [4, 3])


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match="variant"):
        rules.agn("wrong")
    for alpha in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"α = ηρ"):
            rules.aeasgd(alpha)
    with pytest.raises(ValueError, match="needs the gradients"):
        world(rules.agn("gradient"), None, [0.0])
