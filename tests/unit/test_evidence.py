"""The comparison of rules (examples/evidence): the quorum's step, what is compared, and its driver on a few images."""

import sys

import numpy as np
import pytest
from in_process import world
from launcher import ROOT
from made_up_mnist import made_up_mnist

from agnmpi.core import rules
from agnmpi.core.optimizers import nesterov, sgd

sys.path.extend([str(ROOT / "examples/evidence"), str(ROOT / "examples"), str(ROOT / "examples/paper")])
import compare
import defaults
import mnist_mlp
import resumable
import scenarios
from quorum import QuorumConfig, quorum


def steps(optimizer, gradients, weights):
    """Where 0 is after each of the steps."""
    x, seen = np.zeros(len(gradients[0])), []
    state = optimizer.init(x)
    for g, w in zip(gradients, weights, strict=True):
        state = optimizer.update(g, state, x, scale=w)
        seen.append(x.copy())
    assert state.step == len(gradients)
    assert set(optimizer.slots(state)) == {"momentum", "total", "sums"}
    return seen


def test_one_step_for_k_commits():
    """(3, 0) and (0, 4), the second with three times the weight: the mean, and that of direction and length apart."""
    g, weights = [np.array([3.0, 0.0]), np.array([0.0, 4.0])] * 2, [-1.0, -3.0] * 2
    plain = steps(quorum(commits=2, rate=0.5), g, weights)
    for x, expected in zip(plain, ([0, 0], [0.375, 1.5], [0.375, 1.5], [0.75, 3.0]), strict=True):
        np.testing.assert_allclose(x, expected)
    apart = steps(quorum(commits=2, apart=True, rate=0.5), g, weights)
    once = 0.5 * (3 + 3 * 4) / 4 * np.array([1.0, 3.0]) / np.sqrt(10)
    for x, expected in zip(apart, (0 * once, once, once, 2 * once), strict=True):
        np.testing.assert_allclose(x, expected)
    np.testing.assert_allclose(steps(quorum(1, apart=True), g, weights)[-1], -np.sum(np.negative(g), axis=0))


def test_its_momentum_is_nesterovs():
    g, weights = [np.array([1.0, -2.0]), np.array([3.0, 0.0])] * 2, [1.0] * 4
    mean, other = np.array([2.0, -1.0]), nesterov(0.7, 0.9)
    expected = np.zeros(2)
    state = other.init(expected)
    for x in steps(quorum(2, rate=0.7, beta=0.9), g, weights)[1::2]:
        state = other.update(mean, state, expected)
        np.testing.assert_allclose(x, expected)


def test_zeros_have_no_direction():
    g, weights = [np.zeros(2), np.array([0.0, 2.0])], [1.0, 1.0]
    np.testing.assert_allclose(steps(quorum(2, apart=True), g, weights)[-1], [0, -1])
    assert not np.any(steps(quorum(2, apart=True), [np.zeros(2)] * 2, weights))


def test_bad_numbers_are_refused():
    for numbers in ({"commits": 0}, {"rate": 0.0}, {"beta": 1.0}):
        with pytest.raises(ValueError, match="are needed"):
            quorum(**numbers)


def test_one_commit_at_a_rate_of_one_nth_is_an_outer_rate_of_one():
    rng, ends = np.random.default_rng(0), []
    target, start = rng.normal(size=6), rng.normal(size=6)
    mine = QuorumConfig(problem="m:P", rule="downpour", quorum_rate=1 / 4)
    for rule, center_optimizer in (
        (rules.weighted(rules.agn(), rules.outer_rate(1.0)), None),
        (mine.make_rule(), mine.make_center_optimizer(0)),
    ):
        _, local, workers = world(rule, sgd(0.1), start, 4, 3, center_optimizer=center_optimizer)
        for _ in range(15):
            for worker in workers:
                worker.step(worker.x - target)
        ends.append(local.c.copy())
    np.testing.assert_allclose(*ends)
    assert np.abs(ends[0] - start).max() > 0.1


def test_the_driver(tmp_path, monkeypatch, capsys):
    """It resumes after a cell, repeats cells to the same numbers, and reports."""
    images = made_up_mnist(tmp_path / "mnist", 400, 40)
    size = scenarios.Size([4], 4, 2.0, 1, 0.5)
    mine = [
        scenarios.Cell(method, "1 to 16 times")
        for method in ("synchronous, λ = 10", "r = 1", "r = 1, R = n", "K = 4, apart, rate 0.004")
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(scenarios, "SIZE", size)
    monkeypatch.setattr(scenarios, "cells", lambda: mine[:2])
    given = ["compare.py", "--data", str(images), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", given)
    compare.main()
    monkeypatch.setattr(scenarios, "cells", lambda: mine)
    compare.main()
    assert "4 cells, 2 to do" in capsys.readouterr().out
    rows = resumable.load(tmp_path / "out/cells.jsonl")
    assert [row["method"] for row in rows] == [cell.method for cell in mine]
    assert all(row["samples"] == 800 for row in rows)
    assert all(0 < row["speed"] < 1 for row in rows)
    assert rows[2]["dropped"] > 0 == rows[1]["dropped"]
    assert "| r = 1 |" in (tmp_path / "out/tables.md").read_text()
    monkeypatch.setattr(sys, "argv", [*given, "--check"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 0
    mnist_mlp.read_set.cache_clear()


def test_the_driver_of_the_defaults(tmp_path, monkeypatch, capsys):
    """It resumes after a cell, and compares with one process of the same seed."""
    images = made_up_mnist(tmp_path / "mnist", 64, 40)
    mine = [defaults.Cell("MNIST", defaults.DEFAULT, 1, 0), defaults.Cell("MNIST", "AGN, λ = 10", 8, 0)]
    given = ["--mnist", str(images), "--fashion", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["defaults.py", *given])
    for done in (1, 2):
        monkeypatch.setattr(defaults, "cells", lambda problems, done=done: mine[:done] if len(problems) == 3 else [])
        defaults.main()
    assert "2 cells, 1 to do" in capsys.readouterr().out
    one, several = resumable.load(tmp_path / "out/defaults.jsonl")
    lines = (tmp_path / "out/defaults.md").read_text().splitlines()
    assert lines == [
        f"**MNIST**, 15 epochs; one process: {one['accuracy']:.1f}", "", "| n | AGN, λ = 10 |", "|---|---|",
        f"| 8 | {several['accuracy'] - one['accuracy']:+.1f} |",
    ]  # fmt: skip


def test_the_table_of_the_defaults():
    """The gap to one process of the same seed: mean, least and greatest, and of how many seeds."""
    seen = {(1, 0): 90.0, (1, 1): 92.0, (8, 0): 89.0, (8, 1): 90.5, (8, 2): 95.0}
    rows = [
        {"problem": "digits", "method": defaults.DEFAULT, "workers": n, "seed": seed, "accuracy": accuracy}
        for (n, seed), accuracy in seen.items()
    ]
    lines = defaults.table(rows).splitlines()
    assert lines[1:] == [
        "**digits**, 60 epochs; one process: 91.0 (90.0 to 92.0; 2)", "", "| n | default |", "|---|---|",
        "| 8 | -1.2 (-1.5 to -1.0; 2) |",
    ]  # fmt: skip


def test_the_cells_of_the_defaults():
    cells = defaults.cells(["digits", "MNIST", "MNIST, all images"])
    several, methods = len(defaults.WORKERS) - 1, len(defaults.METHODS)
    assert len(set(cells)) == len(cells) == defaults.SEEDS * (2 * (2 + methods * several) + 3)
    assert cells[0] == defaults.Cell("digits", defaults.DEFAULT, 1, 0)


def test_what_is_compared():
    cells = scenarios.cells()
    speeds = len(scenarios.SPEEDS) * len(scenarios.SCENES) * scenarios.SIZE.seeds
    assert len(set(cells)) == len(cells) == speeds + len(scenarios.QUORUMS) + 2 * 4
    assert {cell.method for cell in cells} == set(scenarios.METHODS)
    for cell in (cell for cell in cells if not cell.seed):
        scenarios.config(cell, scenarios.SIZE, "mnist").complete()
        assert scenarios.timing(cell).factors(16).size == 16
    equal = 16 * scenarios.SIZE.batch / 0.01
    assert scenarios.fastest(scenarios.Cell("AGN", "1 to 16 times"), scenarios.SIZE) == pytest.approx(
        equal * (4 + 3 * (1 / 2 + 1 / 4 + 1 / 8 + 1 / 16)) / 16
    )
    assert scenarios.fastest(scenarios.Cell("AGN", "stalls"), scenarios.SIZE) == pytest.approx(equal * 15.25 / 16)
