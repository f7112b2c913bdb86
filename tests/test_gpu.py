"""The same rules, optimizers and golden numbers on a device."""

import numpy as np
import pytest
from golden import ONE_WORKER, close
from test_rules import world

from agnmpi.optimizers import OPTIMIZERS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker(case):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    rule, optimizer, center_optimizer, gradients, start, period, local_after, center_after = ONE_WORKER[case]
    _, local, (worker,) = world(rule, optimizer, start, 1, period, center_optimizer=center_optimizer, xp=cupy)
    for t, g in enumerate(gradients, 1):
        worker.step(cupy.full(len(start), float(g)))
        if t in local_after:
            close(cupy.asnumpy(worker.x), local_after[t])
        if t in center_after:
            close(cupy.asnumpy(local.c), center_after[t])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_agree_with_the_host(name):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    rng = np.random.default_rng(0)
    x, gradients = rng.normal(size=1000), rng.normal(size=(5, 1000))
    there, optimizer = cupy.asarray(x), OPTIMIZERS[name](0.05, weight_decay=0.1, clip=1.0)
    state, state_there = optimizer.init(x), optimizer.init(there)
    for g in gradients:
        state = optimizer.update(x, g, state)
        state_there = optimizer.update(there, cupy.asarray(g), state_there)
    np.testing.assert_allclose(cupy.asnumpy(there), x, rtol=1e-10)
