"""The example of a center optimizer of one's own: it does whatever an optimizer of this package must do."""

import numpy as np
import pytest
from delayed_nesterov import delayed_nesterov
from golden import close
from in_process import trajectory, world

from agnmpi import sgd
from agnmpi.core import rules
from agnmpi.core.center import Center


def test_without_momentum_and_at_rate_1_it_is_agn_bit_for_bit():
    plain = trajectory(rules.agn())
    np.testing.assert_array_equal(trajectory(rules.agn(), delayed_nesterov(1.0, every=4, beta=0.0)), plain)
    assert (trajectory(rules.agn(), delayed_nesterov(1.0, every=4, beta=0.1)) != plain).any()


def test_it_is_the_published_form():
    """In the letters of arXiv:2401.09135: ε = ηN, m of means; in place."""
    rng, eta, beta, every, stops = np.random.default_rng(0), 0.7, 0.6, 3, []
    x = rng.normal(size=50)
    expected, m, buffer, epsilon = x.copy(), np.zeros_like(x), np.zeros_like(x), eta * every
    optimizer, place = delayed_nesterov(eta, every, beta), x
    state = optimizer.init(x)
    for t in range(1, 10):
        d, before = rng.normal(size=x.size), state[1:]
        state = rules.center_step(x, d, 0.5, optimizer, state, on_block=stops.append)
        assert all(slot is there for slot, there in zip(state[1:], before))
        d = 0.5 * d
        buffer += d
        expected += epsilon * d / every
        if t % every == 0:
            m = beta * m + buffer / every
            expected += epsilon * beta * m
            buffer[:] = 0
    assert stops == [50] * 9
    assert x is place
    np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-12)
    assert set(optimizer.slots(state)) == {"momentum", "buffer"}


def test_on_a_quadratic():
    """One worker, N = 1: the momentum moves with every commit: m ← βm + d, c ← c + η(d + βm), d = (q − 1)c."""
    eta, k = 0.1, 3
    _, local, (worker,) = world(rules.downpour(), sgd(eta), [2.0], 1, k, center_optimizer=delayed_nesterov(0.8, 1, 0.5))
    c, m, q = 2.0, 0.0, (1 - eta) ** k
    for _ in range(15):
        for _ in range(k):
            worker.step(worker.x.copy())
        d = (q - 1) * c
        m = 0.5 * m + d
        c += 0.8 * (d + 0.5 * m)
        close([local.c[0], worker.x[0]], [c, c])


def test_pieces_without_a_gradient_keep_still():
    x, g, optimizer = np.ones(6), np.ones(6), delayed_nesterov(0.5, 1, 0.5)
    state = optimizer.update(g, optimizer.init(x), x, ranges=[(0, 2), (4, 5)])
    assert (x != 1).tolist() == (state.momentum != 0).tolist() == [True, True, False, False, True, False]


def test_a_checkpoint_keeps_its_state():
    rng = np.random.default_rng(0)
    c, deltas = rng.normal(size=4), rng.normal(size=(5, 4))
    whole, resumed = c.copy(), c.copy()
    optimizer = delayed_nesterov(0.7, 3, 0.5)
    center, other = Center(rules.agn(), c, 1, optimizer), Center(rules.agn(), c, 1, optimizer)
    for d in deltas[:2]:
        center.state = rules.center_step(whole, d, 1.0, optimizer, center.state)
    arrays, facts = center.save(whole)
    assert set(arrays) == {"c", "slot/momentum", "slot/buffer"}
    other.restore(arrays, facts, resumed)
    for d in deltas[2:]:
        center.state = rules.center_step(whole, d, 1.0, optimizer, center.state)
        other.state = rules.center_step(resumed, d, 1.0, optimizer, other.state)
    np.testing.assert_array_equal(resumed, whole)


@pytest.mark.parametrize("numbers", [(0.0, 1, 0.5), (1.0, 0, 0.5), (1.0, 1, 1.0)])
def test_bad_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="are needed"):
        delayed_nesterov(*numbers)
