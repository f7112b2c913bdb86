"""Allreduce rules in virtual time: a round ends when the slowest has come, and is local SGD or DiLoCo."""

import numpy as np
import pytest
from in_process import config
from launcher import ROOT
from problems import Quadratic

from agnmpi.core.batches import Plan
from agnmpi.core.division import rounds
from agnmpi.core.leases import Lease
from agnmpi.core.optimizers import nesterov
from agnmpi.core.params import Layout
from agnmpi.recovery.files import load
from agnmpi.simulation import simulate
from agnmpi.simulation.timing import Timing
from agnmpi.training.problem import gradient_of


def by_hand(given, n, center_optimizer=None):
    """c after each worker's steps from c, and then the mean of all displacements, round by round."""
    given = given.complete()
    problem = Quadratic()
    plan = Plan(problem.samples, given.batch, steps=given.steps, seed=given.seed)
    initial = problem.init(np.random.default_rng(given.seed))
    layout = Layout.of(initial)
    c = layout.pack(initial)
    optimizer = given.make_optimizer(plan.steps)
    states = [optimizer.init(c) for _ in range(n)]
    outer = center_optimizer.init(c) if center_optimizer else None
    for leases in zip(*(rounds(plan.steps, given.period, worker, n) for worker in range(n)), strict=True):
        total = np.zeros_like(c)
        for worker, lease in enumerate(leases):
            x = c.copy()
            gradient = gradient_of(problem, layout, plan, x)
            for step in range(lease.first, lease.first + lease.steps):
                states[worker] = optimizer.update(gradient(step)[1], states[worker], x, step=step)
            total += x - c
        mean = total / sum(lease.steps > 0 for lease in leases)
        if center_optimizer:
            outer = center_optimizer.update(mean, outer, c, scale=-1.0)
        else:
            c += mean
    return layout.views(c)


RULES = [({"rule": "synchronous"}, None), ({"rule": "diloco", "optimizer": "sgd", "rate": 0.05}, nesterov(0.7, 0.9))]
# 78 steps of 5 workers, 3 each in a round: 5 rounds, and one in which three workers have a step and two none.
STEPS = {"period": 3, "steps": 78}
TIMING = Timing(step_time=0.1, speed_factors="1,1,4,2,1", latency=0.02, bandwidth=1e3)
ROUND, LAST, SUM = 3 * 0.4, 0.4, 2 * (0.02 + 24 / 1e3)  # seconds of the slowest worker; of the sum of 6 numbers


@pytest.mark.parametrize(("options", "outer"), RULES, ids=["synchronous", "diloco"])
def test_it_is_the_rule_and_waits_for_the_slowest(tmp_path, options, outer):
    given = config(tmp_path / "run", 5, **STEPS, **options)
    result = simulate.run(given, TIMING)()
    assert result["commits"] == 5 * 5 + 3
    assert result["samples"] == Plan(240, 16, steps=78).count(Lease(0, 78))
    assert result["staleness"]["max"] == 0
    assert result["virtual"]["seconds"] == pytest.approx(5 * (ROUND + SUM) + LAST + SUM)
    arrays, _ = load(tmp_path / "run/center.safetensors")
    for key, value in by_hand(given, 5, outer).items():
        np.testing.assert_allclose(arrays[key], value, rtol=1e-4, atol=1e-6)


def test_overlap_hides_the_sum(tmp_path):
    result = simulate.run(config(tmp_path / "run", 5, overlap=True, **STEPS, **RULES[0][0]), TIMING)()
    assert result["virtual"]["seconds"] == pytest.approx(5 * ROUND + LAST + SUM)
    assert result["commits"] == 5 * 5 + 3


def test_a_round_with_nan_is_refused(tmp_path):
    problem = f"{ROOT}/tests/support/problems.py:OneBadSample"
    result = simulate.run(config(tmp_path / "run", 2, problem=problem, rule="synchronous"), TIMING)()
    assert result["commits"] == 2 * (20 - 8), "a round of each epoch is refused"
    assert np.isfinite(result["metrics"]["distance"])


def test_it_stops_where_the_metric_is_reached(tmp_path):
    given = config(tmp_path / "run", 5, rule="synchronous", monitor="distance:min", stop_at=0.7, evaluate_every=0.2)
    result = simulate.run(given, TIMING)()
    assert result["metrics"]["distance"] <= 0.7
    assert result["samples"] < 8 * 240
