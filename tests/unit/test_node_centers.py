"""Node centers: which ranks these are, what they do with commits and steps, and what goes with them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree import Tree

from agnmpi import sgd, transports
from agnmpi.cluster.placement import node_centers
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Lease, Leases
from agnmpi.core.membership import Membership
from agnmpi.core.messages import MISFIT, OK, REFUSED, STOP, STOP_ALL, Commit
from agnmpi.core.observer import Observer
from agnmpi.training.config import Config
from agnmpi.transport.agreement import ConfigError

seeds = st.integers(0, 2**32)
shapes = st.tuples(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=1, max_size=3))


def one_hot(size):
    """SGD with rate 1 then adds 1 to the element of its step: what is committed can be counted."""
    return lambda worker, step: -(np.arange(size) == step).astype(float)


@given(shapes, st.integers(0, 40), st.integers(1, 5), st.booleans(), seeds)
@settings(max_examples=20)
def test_every_step_is_committed_once_whoever_acts_when(shape, total, period, overlap, seed):
    direct, hosts = shape
    tree, draw = Tree(rules.downpour(), sgd(1.0), np.zeros(40), direct, hosts, period, overlap), random.Random(seed)
    expected = np.zeros(40)
    for session in (total, 7):
        before = tree.top.steps
        taken = tree.play(session, one_hot(40), draw.randrange)
        expected[:session] += 1
        assert sorted(step for steps in taken for step in steps) == list(range(session))
        assert (tree.top.leases.committed, tree.top.steps - before) == (session, session)
        for x in [tree.local.c, *(node.c for node in tree.nodes), *(worker.x for worker in tree.workers)]:
            np.testing.assert_array_equal(x, expected)
        assert {center.clock for center in tree.centers} == {tree.top.clock}
        assert {worker.before for worker in tree.workers} == {tree.top.steps}


@given(shapes, st.integers(1, 5), st.dictionaries(st.integers(0, 13), st.integers(0, 9)), st.booleans(), seeds)
@settings(max_examples=20)
def test_what_a_worker_leaves_undone_goes_to_the_others(shape, period, most, overlap, seed):
    direct, hosts = shape
    tree = Tree(rules.downpour(), sgd(1.0), np.zeros(30), direct, hosts, period, overlap)
    taken = tree.play(30, one_hot(30), random.Random(seed).randrange, most)
    steps = sorted(step for steps in taken for step in steps)
    assert all(len(steps) <= most.get(i, 30) for i, steps in enumerate(taken))
    if any(worker not in most for worker in range(tree.count)):
        assert steps == list(range(30))
    assert len(set(steps)) == len(steps)
    np.testing.assert_array_equal(np.flatnonzero(tree.local.c), steps)
    np.testing.assert_array_equal(tree.local.c[steps], 1)
    assert tree.top.steps == tree.top.leases.committed == len(steps)


@given(shapes, st.booleans(), seeds)
@settings(max_examples=20)
def test_clocks_are_exact_all_over_the_tree(shape, overlap, seed):
    """Each commit adds 1: c of clock t is t at the center, at each node center, and where a worker has pulled it."""
    direct, hosts = shape
    tree = Tree(rules.downpour(), sgd(1.0), [0.0], direct, hosts, 1, overlap)

    def check():
        for node in tree.nodes:
            assert np.isnan(node.c[0]) or node.c[0] == node.center.clock
            assert np.isnan(node.c[0]) or node.center.steps == node.center.clock
        assert tree.local.c[0] == tree.top.clock

    def gradient(worker, step):
        assert worker.o[0] == worker.clock
        return -np.ones(1)

    tree.play(50, gradient, random.Random(seed).randrange, after=check)
    assert tree.top.clock == 50


class Sums(Observer):
    def __init__(self):
        self.commits = []

    def committed(self, commit, c):
        self.commits.append(commit)


def test_a_sum_is_of_as_many_commits_as_there_are_workers():
    """In turn: 4 workers on one host; each sum has their mean loss and their number, and bytes fall by as much."""
    tree, turn = Tree(rules.agn(), sgd(1.0), np.zeros(3), 0, [4], 2), iter(range(10**6))
    tree.top.observer = sums = Sums()
    tree.play(80, lambda worker, step: np.zeros(3), lambda actors: next(turn) % actors)
    assert [commit.commits for commit in sums.commits] == [4] * 10
    assert [commit.steps for commit in sums.commits] == [8] * 10
    assert [commit.leases for commit in sums.commits] == [(Lease(first, 8),) for first in range(0, 80, 8)]
    assert [commit.loss for commit in sums.commits] == [first + 3.5 for first in range(0, 80, 8)]


def test_workers_go_on_during_a_slow_exchange_for_two_periods_and_no_longer():
    """While the center is away its node centers serve; what waits is one sum."""
    tree = Tree(rules.downpour(), sgd(1.0), np.zeros(400), 0, [3], 2)
    tree.top.observer = sums = Sums()
    draw, away = random.Random(0), 60
    count = iter(range(10**6))

    def choose(actors):
        """The center, the last but one, acts once in a while only."""
        while (i := draw.randrange(actors)) == actors - 2 and next(count) % away:
            pass
        return i

    taken = tree.play(400, one_hot(400), choose)
    np.testing.assert_array_equal(tree.local.c, 1)
    assert sum(map(len, taken)) == 400
    assert 6 <= max(commit.commits for commit in sums.commits) <= 9, "what they had begun, and two periods of each"


RULES = {
    "agn": rules.agn(),
    "downpour": rules.downpour(),
    "dynsgd": rules.dynsgd(),
    "outer rate 1": rules.weighted(rules.agn(), rules.outer_rate(1.0)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("encoding", "overlap"), [("float32", False), ("int8", True)])
def test_every_rule_that_adds_converges(name, encoding, overlap):
    rng = np.random.default_rng(0)
    target = rng.normal(size=600)
    tree = Tree(RULES[name], sgd(0.05), np.zeros(600), 1, [2, 3], 3, overlap, encoding, encoding, "f4")
    tree.play(2000, lambda worker, step: worker.x - target, random.Random(1).randrange)
    np.testing.assert_allclose(tree.local.c, target, atol=0.01 if encoding == "float32" else 0.06)


def test_weights_are_of_single_commits_with_all_workers_of_the_tree():
    seen = []

    def weight(commit):
        seen.append(commit)
        return 0.5

    rule = rules.weighted(rules.downpour(), weight)
    tree = Tree(rule, sgd(1.0), np.zeros(20), 1, [2, 2], 2)
    tree.play(20, one_hot(20), random.Random(0).randrange)
    np.testing.assert_array_equal(tree.local.c, 0.5)
    assert len(seen) == 10
    assert {(commit.commits, commit.steps, commit.workers) for commit in seen} == {(1, 2, 5)}


def test_commits_that_are_too_old_are_done_again():
    rule = rules.weighted(rules.downpour(), rules.staleness_cap(1))
    tree = Tree(rule, sgd(1.0), np.zeros(60), 0, [3, 3], 2)
    tree.play(60, one_hot(60), random.Random(3).randrange)
    np.testing.assert_array_equal(tree.local.c, 1)
    assert sum(node.center.dropped for node in tree.nodes) > 0


@pytest.mark.parametrize("times", [1, 2])
def test_steps_that_are_refused_go_to_another_host_or_are_given_up(times):
    """NaN on steps 4 and 5, once, or on both hosts."""
    tree, failures = Tree(rules.downpour(), sgd(1.0), np.zeros(24), 0, [2, 2], 2), []

    def gradient(worker, step):
        g = one_hot(24)(worker, step)
        if step == 5 and len(failures) < times:
            failures.append(worker.index)
            g[:] = np.nan
        return g

    tree.play(24, gradient, random.Random(5).randrange)
    missing = [4, 5] if times == 2 else []
    np.testing.assert_array_equal(tree.local.c, [step not in missing for step in range(24)])
    assert (tree.top.refused, tree.top.given_up) == (times, len(missing))
    assert tree.top.settled == 24
    assert len({worker // 2 for worker in failures}) == times, "then another host"


def test_a_sum_that_overflows_is_refused_and_its_steps_are_done_again():
    tree, seen = Tree(rules.downpour(), sgd(1.0), np.zeros(16), 0, [2, 2], 1, dtype="f4"), {}

    def gradient(worker, step):
        g = one_hot(16)(worker, step).astype("f4")
        if seen.setdefault(step, worker.index) == worker.index and step < 4:
            g[15] = -3e38  # each is finite; two are not
        return g

    with np.errstate(over="ignore", invalid="ignore"):
        tree.play(16, gradient, random.Random(2).randrange)
    assert tree.top.refused > 0
    assert np.isfinite(tree.local.c).all()
    done = [step for step in range(15) if tree.local.c[step]]
    assert len(done) == 15 - sum(step < 15 for step in range(15) if not tree.local.c[step])
    assert tree.top.settled == 16
    np.testing.assert_array_equal(tree.local.c[done], 1)


def test_a_request_to_stop_reaches_every_worker_and_nothing_is_lost():
    tree = Tree(rules.downpour(), sgd(1.0), np.zeros(500), 1, [2, 2], 5)

    def stop():
        if tree.top.steps > 100:
            tree.top.control = STOP

    taken = tree.play(None, one_hot(500), random.Random(0).randrange, after=stop)
    steps = [step for steps in taken for step in steps]
    assert 100 < len(steps) < 400
    np.testing.assert_array_equal(np.flatnonzero(tree.local.c), sorted(steps))
    assert tree.top.steps == len(steps)


def test_a_worker_that_asks_all_to_stop_is_heard_on_every_host():
    tree = Tree(rules.downpour(), sgd(1.0), np.zeros(500), 1, [2, 2], 5)

    def gradient(worker, step):
        if worker.index == 4 and worker.sequence == 3 and not worker.held.done:
            worker.end.exchange(Commit(4, requests=STOP_ALL), None)
        return one_hot(500)(worker, step)

    taken = tree.play(None, gradient, random.Random(0).randrange)
    steps = sorted(step for steps in taken for step in steps)
    assert 20 <= len(steps) < 400
    np.testing.assert_array_equal(np.flatnonzero(tree.local.c), steps)
    assert {center.control for center in tree.centers} == {STOP}


def test_a_checkpoint_announced_at_the_center_reaches_every_worker():
    tree = Tree(rules.downpour(), sgd(1.0), np.zeros(90), 0, [2, 2], 3)
    tree.top.checkpoint = 17
    tree.play(90, one_hot(90), random.Random(0).randrange)
    assert {worker.checkpoint for worker in tree.workers} == {17}


@given(seeds)
@settings(max_examples=10)
def test_buffers_stay_between_what_workers_have(seed):
    """A node center sends the mean of its commits' buffers, which counts 1 − (1 − 1/n)^D."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    tree = Tree(rules.downpour()._replace(buffers=2), sgd(1.0), [0.0, 0.5, 0.5], 1, [3], 1)

    def gradient(worker, step):
        worker.x[1:] = rng.uniform(0, 1, 2)
        return np.array([-1.0, 0, 0])

    tree.play(40, gradient, draw.randrange)
    assert tree.local.c[0] == 40
    assert (tree.local.c[1:] > 0).all()
    assert (tree.local.c[1:] < 1).all()
    assert (tree.nodes[0].c == tree.local.c).all()


def test_the_buffers_of_a_sum_count_as_those_of_its_commits():
    center, c = Center(rules.downpour()._replace(buffers=1), np.zeros(2), 4), np.array([0.0, 1.0])
    center.nodes, center.applied = {4}, [0] * 5
    center.apply(Commit(4, 1, commits=3, payload=np.array([6.0, 0.0])), c)
    np.testing.assert_allclose(c, [6, (3 / 4) ** 3])


# Messages and steps.


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), max_size=5), st.binary(max_size=40))
def test_a_header_with_parts(parts, rest):
    commit = Commit(3, 7, commits=2, wanted=9, loss=0.5, parts=tuple(Lease(*part) for part in parts))
    assert Commit.decode(commit.encode()) == commit
    assert Commit.split(commit.encode() + rest) == (commit, rest)
    if rest:
        with pytest.raises(ValueError, match="header"):
            Commit.decode(commit.encode() + rest)
    for cut in {0, len(commit.encode()) - 1}:
        with pytest.raises(ValueError, match="header"):
            Commit.split(commit.encode()[:cut])


def test_only_node_centers_send_sums():
    sent = Commit(0, 1, commits=2, payload=np.ones(1))
    center, c = Center(rules.agn(), np.zeros(1), 2), np.zeros(1)
    assert center.apply(sent, c).status == REFUSED
    assert (c[0], center.clock, center.refused) == (0, 0, 1)
    center.nodes = {0}
    assert center.apply(sent._replace(sequence=2), c).status == OK
    assert (c[0], center.clock) == (1, sent.commits)
    misfit = Commit(0, 1, commits=0, nbytes=8).received_from(0, [8])
    assert (misfit.flags, misfit.commits) == (MISFIT, 1)
    misfit = Commit(0, 1, steps=3, nbytes=8, parts=(Lease(0, 2),)).received_from(0, [8])
    assert (misfit.flags, misfit.parts) == (MISFIT, ()), "its parts have other steps than it says"


def test_parts_of_a_lease():
    book = Leases(40, 4)
    assert [book.grant(7, periods=3), book.grant(7, periods=2)] == [Lease(0, 12), Lease(12, 8)]
    book.carve(7, Lease(10, 6))  # of two grants that adjoin
    book.commit(7, Lease(10, 6))
    assert book.held_by(7) == [Lease(0, 10), Lease(16, 4)]
    with pytest.raises(ValueError, match="worker 7 commits steps"):
        book.carve(7, Lease(8, 4))
    book.forget(7)
    assert (book.committed, sorted(book.free)) == (6, [Lease(0, 10), Lease(16, 4)])


# Which ranks.

placements = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@given(placements)
def test_each_rank_has_one_part(hosts):
    groups, size = node_centers(hosts), len(hosts)
    setup = Setup(transports.p2p(node_centers=True), nodes=tuple(groups))
    workers = setup.workers(size)
    assert sorted([*setup.serving_ranks, *workers]) == list(range(size))
    assert setup.center_ranks == range(1)
    for node, *of in groups:
        assert {hosts[rank] for rank in of} == {hosts[node]}
        assert node < min(of)
        assert hosts[node] != hosts[0]
        assert len(of) >= 2
        assert len(of) + 1 == hosts.count(hosts[node])
    without = {hosts[rank] for rank in workers} - {hosts[node] for node, *_ in groups}
    assert all(host == hosts[0] or hosts.count(host) < 3 for host in without)
    members = Membership(size, (0,), [*workers, *(node for node, *_ in groups)])
    assert [members.rank_of(i) for i in range(len(workers))] == workers


def test_the_options():
    config = Config("m:P", rate=0.1, node_centers=True).complete()
    assert config.make_transport() == transports.p2p(node_centers=True)
    check_setup(config.make_rule(), Setup(config.make_transport()), 2, sgd(0.1), None)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rule": "aeasgd"}, "rule aeasgd ties each worker .* leave out node_centers"),
        ({"center_optimizer": "momentum", "center_rate": 0.1}, "a center optimizer takes a step for each"),
        ({"variant": "gradient"}, "a center optimizer takes a step for each"),
        ({"centers": 2}, "node_centers with centers = 2"),
        ({"centers": "hosts"}, "node_centers with centers = 'hosts'"),
        ({"dylu": True}, "dylu compares the speeds of all workers"),
        ({"transport": "rma"}, "node_centers needs transport p2p, not 'rma'"),
        ({"rule": "synchronous"}, "node_centers needs transport p2p, not 'allreduce'"),
        ({"drop_stalled": True, "stall_limit": 9.0}, "drop_stalled with node_centers"),
        ({"record": True}, "record is of one center that serves"),
    ],
)
def test_what_does_not_go_with_it(values, text):
    def check():
        config = Config("m:P", node_centers=True, **{"rate": 0.1, **values}).complete()
        optimizers = config.make_optimizer(1), config.make_center_optimizer(1)
        check_setup(config.make_rule(), Setup(config.make_transport(), dylu=config.dylu), 9, *optimizers)

    with pytest.raises(ValueError, match=text):
        check()


def test_with_ulfm_it_is_refused(monkeypatch):
    monkeypatch.setenv("AGNMPI_FT", "1")
    with pytest.raises(ConfigError, match="node_centers with ULFM: workers cannot go on yet"):
        check_setup(rules.agn(), Setup(transports.p2p(node_centers=True)), 9, sgd(0.1), None)
