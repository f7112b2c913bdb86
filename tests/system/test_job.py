"""A whole run against the same algorithm written out plainly, with neither rules nor optimizers of the library."""

import sys

import numpy as np
import pytest
from launcher import ROOT, agnmpi, result_of

from agnmpi.core.batches import Plan
from agnmpi.recovery.files import load

sys.path.insert(0, str(ROOT / "examples"))


def plain_agn(problem, workers, period, plan, rate=0.001):
    """AGN (arXiv:1710.02368, algorithm 1) with local Adam, workers in turn, a step each; float64."""
    params = problem.init(np.random.default_rng(plan.seed))
    names = list(params)
    center = {name: x.copy() for name, x in params.items()}
    state = [
        {"x": {n: center[n].copy() for n in names}, "o": {n: center[n].copy() for n in names}, "t": 0, "k": 0,
         "m": dict.fromkeys(names, 0.0), "v": dict.fromkeys(names, 0.0)}
        for _ in range(workers)
    ]  # fmt: skip
    granted = 0
    mine = [[] for _ in range(workers)]
    for w in range(workers):
        mine[w], granted = list(range(granted, granted + period)), granted + period
    while any(mine):
        for w, s in enumerate(state):
            if not mine[w]:
                continue
            _, g = problem.gradient(s["x"], plan.indices(mine[w].pop(0)))
            s["t"] += 1
            s["k"] += 1
            for n in names:
                s["m"][n] = 0.9 * s["m"][n] + 0.1 * g[n]
                s["v"][n] = 0.999 * s["v"][n] + 0.001 * g[n] ** 2
                m, v = s["m"][n] / (1 - 0.9 ** s["t"]), s["v"][n] / (1 - 0.999 ** s["t"])
                s["x"][n] = s["x"][n] - rate * m / (np.sqrt(v) + 1e-8)
            if not mine[w]:
                for n in names:
                    center[n] += (s["x"][n] - s["o"][n]) / s["k"]
                    s["x"][n], s["o"][n] = center[n].copy(), center[n].copy()
                s["k"] = 0
                more = min(period, plan.steps - granted)
                mine[w], granted = list(range(granted, granted + more)), granted + more
    return center


@pytest.mark.parametrize(("workers", "period"), [(1, 1), (1, 4), (4, 10), (3, 2)])
def test_a_run_is_the_published_algorithm(tmp_path, workers, period):
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install 'agnmpi[examples]'")
    from digits import Digits

    code, output = agnmpi(
        1, "train", f"{ROOT}/examples/digits.py:Digits", "--transport", "local", "--workers", workers,
        "--period", period, "--epochs", 2, "--batch", 32, "--seed", 3, "--run", tmp_path / "run",
        "--outer-rate", "published", "--set", "options.dtype=float64",
    )  # fmt: skip
    assert code == 0, output
    problem = Digits(dtype="float64")
    expected = plain_agn(problem, workers, period, Plan(problem.samples, 32, steps=90, seed=3))
    center, _ = load(tmp_path / "run/center.safetensors")
    for name, x in expected.items():
        np.testing.assert_allclose(center[name], x, rtol=1e-7, atol=1e-10)
    result = result_of(tmp_path / "run")
    assert result["steps"] == 90
