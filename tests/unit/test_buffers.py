"""Buffers: the end of the vector, which the center averages and no rule, weight or optimizer touches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import world

from agnmpi import adam, momentum, sgd
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.messages import Commit
from agnmpi.core.params import Layout
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError

K = 2  # buffers, behind two parameters
NUMBERS = st.floats(-100, 100, width=32)


def with_buffers(rule, count=K):
    return rule._replace(buffers=count)


def exchange(worker, b, move=0.0):
    """The caller moves x by `move`, and its buffers to `b`."""
    worker.x[:-K] += move
    worker.x[-K:] = b
    worker.step(None)


def test_the_layout_puts_them_last():
    layout = Layout.of({"mean": np.ones(2), "w": np.zeros((2, 3)), "n": np.ones(1)}, buffers=("n", "mean"))
    assert (layout.names, layout.size, layout.buffers) == (("w", "mean", "n"), 9, 3)
    with pytest.raises(ValueError, match=r"buffers \['other'\] are not among the parameters"):
        Layout.of({"w": np.zeros(1)}, buffers=["other"])


@pytest.mark.parametrize("weights", [(), (rules.outer_rate(1.0),), (rules.staleness_power(3.0),)], ids=str)
@pytest.mark.parametrize("center_optimizer", [None, momentum(0.5, 0.5, weight_decay=0.5, clip=1e-3)], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_exact_values(weights, center_optimizer, overlap):
    """c_b ← c_b + (b − c_b)/n, whatever else is done to a commit; a pull brings c_b."""
    rule = with_buffers(rules.weighted(rules.agn(), *weights))
    _, local, workers = world(rule, None, [0, 0, 0, 8], 2, center_optimizer=center_optimizer, overlap=overlap)
    expected = np.array([0.0, 8.0])
    for turn, b in enumerate(([4, 4], [2, 0], [-6, 2], [0, 0], [1, 7])):
        worker = workers[turn % 2]
        exchange(worker, b, move=0.25)
        worker.finish_exchange()
        expected = expected + (np.array(b) - expected) / 2
        assert local.c[-K:].tolist() == expected.tolist()
        assert worker.x[-K:].tolist() == expected.tolist()
    assert (local.c[:-K] > 0).all()


@pytest.mark.parametrize(
    "rule", [rules.agn(), rules.downpour(), rules.dynsgd(), rules.aeasgd(0.5)], ids=lambda r: r.name
)
def test_parameters_do_as_without_them(rule):
    """The same numbers for the parameters, with buffers behind them and without."""
    seen = []
    for count in (0, K):
        _, local, workers = world(
            with_buffers(rule, count), adam(0.1), [1.0, -2.0] + [5.0] * count, 2, 3, dtype=np.float32
        )
        for t in range(12):
            for i, worker in enumerate(workers):
                g = np.array([1.0 + t, i - 1.0] + [np.nan] * count, np.float32)  # of the buffers: of no use
                worker.step(g)
        seen.append((local.c[:2].tolist(), [worker.x[:2].tolist() for worker in workers]))
        assert local.c[2:].tolist() == [5.0] * count
    assert seen[0] == seen[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20), st.booleans())
def test_smallest_and_largest_of_all_inputs_bound_them(n, inputs, overlap):
    rule = with_buffers(rules.weighted(rules.agn(), rules.outer_rate(3.0)))
    start = [0.0, 0.0, *inputs[0]]
    _, local, workers = world(rule, None, start, n, overlap=overlap, dtype=np.float32)
    low = high = np.array(inputs[0], np.float32)
    for t, b in enumerate(inputs):
        exchange(workers[t % n], b, move=1.0)
        low, high = np.minimum(low, np.array(b, np.float32)), np.maximum(high, np.array(b, np.float32))
        for x in (local.c, *(worker.x for worker in workers)):
            assert (x[-K:] >= low).all()
            assert (x[-K:] <= high).all()


def test_one_that_is_not_finite_is_refused():
    center, local, (worker,) = world(with_buffers(rules.agn()), None, [1, 1, 3, 3])
    exchange(worker, [1, np.inf], move=1.0)
    assert (center.refused, center.clock, local.c.tolist()) == (1, 0, [1, 1, 3, 3])
    assert worker.x.tolist() == [1, 1, 3, 3]


def test_with_allreduce_they_are_the_mean_of_the_round():
    c = np.array([0.0, 0.0, 1.0, 1.0])
    center = Center(with_buffers(rules.synchronous()), c, workers=3)
    center.apply(Commit(0, 1, steps=2, commits=2, payload=np.array([2.0, 4.0, 6.0, -2.0])), c)
    assert c.tolist() == [1, 2, 3, -1]


def test_a_block_has_those_that_lie_in_it():
    rule = with_buffers(rules.agn(), 5)
    blocks = [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert [rule.of_block(block, 12).buffers for block in blocks] == [0, 1, 4]


@pytest.mark.parametrize(
    ("transport", "says"),
    [
        (registry.accumulate(), "buffers are averaged, .*use transport p2p"),
        (registry.p2p(encoding="int8"), "leave encoding and pull_encoding"),
        (registry.p2p(pull_encoding="bf16"), "leave encoding and pull_encoding"),
    ],
)
def test_what_cannot_carry_them_is_refused(transport, says):
    with pytest.raises(ConfigError, match=says):
        check_setup(with_buffers(rules.agn()), Setup(transport), 3, sgd(0.1), None)
    check_setup(rules.agn(), Setup(transport), 3, sgd(0.1), None)
