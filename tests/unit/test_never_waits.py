"""Workers that do not wait for an exchange: they take further steps, and each step is committed once all the same."""

import random

import numpy as np
import pytest
from golden import close
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import config, world
from mpi4py import MPI
from problems import Quadratic
from tree import Tree

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import FEWEST_PERIODS, MAX_PARTS, PERIODS, Lease, Leases
from agnmpi.core.messages import NOT_FINITE, OK, PULL, REFUSED, WORK, Commit
from agnmpi.core.observer import Observer
from agnmpi.simulation import simulate
from agnmpi.simulation.timing import Timing
from agnmpi.training.config import Config
from agnmpi.transport import registry as transports
from agnmpi.transport.agreement import ConfigError


class Commits(Observer):
    def __init__(self):
        self.all = []

    def committed(self, commit, c):
        self.all.append(commit._replace(payload=None))


def alone(rule, period, periods=PERIODS):
    """A center that logs its commits, and its only worker, which holds so many periods."""
    center, local, (worker,) = world(rule, sgd(1.0), [0.0], 1, period, wait=False, begin=False)
    center.observer = commits = Commits()
    worker.held.periods = periods
    worker.begin()
    return center, local, worker, commits


def test_exact_values():
    """One worker, SGD(1), gradient −t in step t = 1, 2, …, AGN, λ = 2: a commit is the mean of the steps since."""
    center, local, worker, commits = alone(rules.agn(), 2)

    def step(t):
        worker.step(np.array([-float(t)]))

    step(1), step(2)  # x = 3; commit 3/2
    for t in (3, 4, 5):  # not answered: it goes on
        step(t)
    close([worker.x[0], worker.o[0], local.c[0]], [15, 0, 0])
    assert local.serve_one(center.apply)
    close([worker.x[0], local.c[0]], [15, 1.5])
    step(6)  # x = 21; the answer is there: x ← 1.5 + (21 − 3), and 4 steps are done: commit (19.5 − 1.5)/4
    close([worker.x[0], worker.o[0]], [19.5, 1.5])
    assert local.serve_one(center.apply)
    step(7)  # x = 26.5; x ← 6 + (26.5 − 19.5); one step is done
    close([worker.x[0], worker.o[0], local.c[0]], [13, 6, 6])
    assert worker.under_way is None
    step(8)  # x = 21; commit (21 − 6)/2
    assert local.serve_one(center.apply)
    close(local.c[0], 13.5)
    made = [(commit.first_step, commit.steps, commit.clock) for commit in commits.all]
    assert made == [(0, 2, 0), (2, 4, 1), (6, 2, 2)]


def periods_of(delays, period, periods=PERIODS):
    """The steps in each commit of one worker, where the i-th is answered after delays[i] further steps."""
    center, local, worker, commits = alone(rules.downpour(), period, periods)
    taken, answered_at, delays = 0, -1, list(delays)
    while delays or worker.under_way:
        if taken == answered_at:
            local.serve_one(center.apply)
        before = worker.sequence
        worker.step(-np.ones(1))
        taken += 1
        if worker.sequence > before and delays:
            answered_at = taken + delays.pop(0) - 1
        elif worker.sequence > before:
            break
    assert [step for commit in commits.all for part in commit.leases for step in range(*_ends(part))] == list(
        range(center.steps)
    )
    return [commit.steps for commit in commits.all], worker.held.periods


def _ends(lease):
    return lease.first, lease.first + lease.steps


@pytest.mark.parametrize(
    ("period", "delays", "steps"),
    [
        (4, [1, 2, 4, 3], [4, 4, 4, 4]),  # all answers in time: λ
        (3, [1, 5, 3, 4, 12], [3, 3, 5, 3, 4]),
        (1, [1, 2, 3, 4], [1, 1, 2, 3]),
        (2, [8, 8, 8, 8], [2, 8, 8, 8]),
        # It holds 8 periods, of which 3 steps are under way: 21; then what it was granted meanwhile, 3, and so on.
        (3, [99, 99, 99, 99], [3, 21, 3, 21]),
        (3, [12, 12, 12, 12, 12], [3, 12, 12, 12, 12]),
    ],
)
def test_a_period_is_as_long_as_its_exchange_but_at_least_the_period(period, delays, steps):
    assert periods_of(delays, period) == (steps, PERIODS)


@pytest.mark.parametrize(
    ("delays", "steps", "held"),
    [
        ([1, 2, 1, 2, 1, 2], [3, 3, 3, 3, 3, 3], 2),  # never short of steps
        ([99, 1, 99, 1, 1], [3, 3, 3, 9, 3], 8),
        ([99] * 7, [3, 3, 3, 9, 15, 9, 15], 8),
    ],
)
def test_a_worker_holds_twice_as_much_when_it_was_short_of_steps(delays, steps, held):
    assert periods_of(delays, 3, FEWEST_PERIODS) == (steps, held)


@given(
    st.integers(1, 4),
    st.integers(0, 60),
    st.integers(1, 4),
    st.sampled_from([rules.downpour(), rules.weighted(rules.downpour(), rules.staleness_cap(2))]),
    st.dictionaries(st.integers(0, 3), st.integers(0, 9)),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_each_step_once_whoever_acts_when(workers, total, period, rule, most, seed):
    """Commits that are late, dropped as too old, or of a worker that was silent meanwhile; workers that leave."""
    tree, draw = Tree(rule, sgd(1.0), np.zeros(60), workers, [], period, wait=False), random.Random(seed)
    tree.top.observer, leases = (commits := Commits()), None

    def gradient(worker, step):
        held = worker.held.leases
        assert sum(lease.steps for lease in held) <= PERIODS * period
        return -(np.arange(60) == step).astype(float)

    def after():
        nonlocal leases
        if draw.random() < 0.005:
            tree.top.worker_lost(draw.randrange(workers))  # its steps go to others, and it comes back
        leases = tree.top.leases

    most = {worker: steps for worker, steps in most.items() if worker}
    tree.play(total, gradient, draw.randrange, most, after)
    np.testing.assert_array_equal(tree.local.c[:total], 1)
    assert not tree.local.c[total:].any()
    assert tree.top.steps == total == sum(commit.steps for commit in commits.all)
    if leases is not None:
        assert (leases.committed, leases.open()) == (total, [])
    assert all(commit.steps <= PERIODS * period and len(commit.parts) <= MAX_PARTS for commit in commits.all)


@given(
    st.integers(1, 4),
    st.integers(1, 60),
    st.integers(1, 4),
    st.sets(st.integers(0, 59), max_size=3),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_what_always_fails_is_given_up(workers, total, period, bad, seed):
    tree, draw = Tree(rules.downpour(), sgd(1.0), np.zeros(60), workers, [], period, wait=False), random.Random(seed)
    tree.top.patience = 10**9

    def gradient(worker, step):
        return -(np.arange(60) == step).astype(float) * (np.nan if step in bad else 1.0)

    if bad >= set(range(total)):
        return  # then the run fails
    tree.play(total, gradient, draw.randrange)
    assert tree.top.settled == total
    assert tree.local.c.sum() == tree.top.steps == tree.top.leases.committed
    assert not tree.local.c[sorted(bad)].any()
    assert tree.local.c.max(initial=0) <= 1


@given(st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_clocks_are_exact(workers, seed):
    """Each commit adds its steps: c is their number, and staleness counts the commits since the pull."""
    tree = Tree(rules.downpour(), sgd(1.0), [0.0], workers, [], 2, wait=False)

    def gradient(worker, step):
        assert worker.o[0] == worker.last_reply.steps
        return -np.ones(1)

    tree.play(80, gradient, random.Random(seed).randrange)
    assert tree.local.c[0] == 80
    assert tree.top.clock <= 40, "no commit but the last of a worker has fewer than λ steps"


def test_nobody_takes_all_the_work_of_a_short_session():
    """45 steps, λ = 3, 3 workers that ask for 8 periods: a third of what is left for each, in whole periods."""
    center = Center(rules.agn(), np.zeros(1), 3)
    center.leases = Leases(45, 3)
    ask = [Commit(worker, requests=WORK, total=45, wanted=PERIODS) for worker in (0, 1, 2, 0)]
    assert [center.apply(commit, np.zeros(1)).work.steps for commit in ask] == [15, 12, 6, 6]
    assert center.leases.left == 6


def test_the_rest_of_a_lease_stays_with_its_worker():
    center, c = Center(rules.downpour(), np.zeros(1), 2), np.zeros(1)
    center.leases = Leases(None, 4)
    assert center.apply(Commit(0, requests=WORK, wanted=3), c).work == Lease(0, 12)
    assert center.apply(Commit(1, requests=WORK), c).work == Lease(12, 4)
    reply = center.apply(Commit(0, 1, 5, 0, requests=WORK | PULL, wanted=1, payload=np.ones(1)), c)
    assert (reply.work, reply.period) == (Lease(16, 4), 4)
    assert center.leases.held_by(0) == [Lease(5, 7), Lease(16, 4)]
    spanning = Commit(0, 2, 8, 5, parts=(Lease(5, 7), Lease(16, 1)), payload=np.ones(1))
    assert center.apply(spanning._replace(flags=NOT_FINITE), c).status == REFUSED
    assert center.leases.held_by(0) == [Lease(17, 3)]
    assert sorted(center.leases.free) == [Lease(5, 7), Lease(16, 1)]
    assert center.apply(Commit(0, 3, 1, 17, payload=np.ones(1)), c).status == OK
    with pytest.raises(ValueError, match=r"worker 0 commits steps .*holds"):
        center.apply(Commit(0, 4, 3, 18, parts=(Lease(18, 2), Lease(12, 1)), payload=np.ones(1)), c)


def test_dylu_says_each_worker_its_own_period():
    center, local, made = world(rules.downpour(), sgd(1.0), [0.0], 2, 6, wait=False, begin=False)
    center.leases = Leases(None, 6, lambda worker, _steps: 2 + 4 * worker)
    center.observer = commits = Commits()
    for worker in made:
        worker.begin()
    assert [worker.held.period for worker in made] == [2, 6]
    assert [sum(lease.steps for lease in worker.held.leases) for worker in made] == [4, 12]
    for _ in range(12):
        for worker in made:
            worker.step(-np.ones(1))
            local.serve_one(center.apply)
    assert [commit.steps for commit in commits.all if commit.worker == 0] == [2] * 6
    assert [commit.steps for commit in commits.all if commit.worker == 1] == [6] * 2


@pytest.mark.parametrize("variant", ["displacement", "gradient"])
def test_in_virtual_time_nobody_waits(tmp_path, variant):
    """An exchange takes 5 steps' time, λ is 2: with overlap workers wait for most of it, else at the end alone."""
    timing, busy, means = Timing(step_time=0.01, latency=0.025, bandwidth=0, service=0, service_bandwidth=0), [], []
    for i, options in enumerate([{"overlap": True}, {"wait": False}]):
        run = config(tmp_path / str(i), 3, period=2, epochs=60, rate=0.02, variant=variant, **options)
        result = simulate.run(run, timing)()
        assert (result["samples"], result["given_up"]) == (60 * Quadratic.samples, 0)
        busy.append(result["virtual"]["utilisation"]["workers"])
        means.append(result["steps_per_commit"])
    assert busy[1] > 2 * busy[0]
    assert means[0] == pytest.approx(2, abs=0.05)
    assert means[1] == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(
    ("rule", "transport", "said"),
    [
        (rules.synchronous(), transports.allreduce(), "exchanges on all ranks at once"),
        (rules.aeasgd(0.5), transports.p2p(), "takes two exchanges"),
        (rules.agn(), transports.p2p(node_centers=True), "not the workers wait for the network, but the node centers"),
    ],
    ids=["synchronous", "aeasgd", "node centers"],
)
def test_what_cannot_go_on_is_refused(rule, transport, said):
    setup = Setup(transport, overlap=True, wait=False)
    with pytest.raises(ConfigError, match=rf"wait = False.*{said}.*leave wait on"):
        check_setup(rule, setup, 4, sgd(0.1), None)
    check_setup(rule, setup._replace(wait=True), 4, sgd(0.1), None)


def test_where_exchanges_take_no_time_and_where_a_run_is_recorded_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="overlap has no meaning on transport local"):
        AGNOptimizer(sgd(0.1), np.zeros(1), MPI.COMM_SELF, wait=False, transport="local")
    with pytest.raises(ValueError, match="record with overlap"):
        Config(record=True, wait=False)
    with pytest.raises(ValueError, match="takes two exchanges"):
        simulate.run(config(tmp_path / "run", 2, rule="aeasgd", wait=False), Timing())
    with pytest.raises(ValueError, match="exchanges on all ranks at once"):
        simulate.run(config(tmp_path / "run", 2, rule="synchronous", wait=False), Timing())
    with pytest.raises(ValueError, match="leave --no-wait"):
        simulate.network(config(tmp_path / "run", 2, wait=False), Timing())
