"""Buffers over real ranks: each transport that carries them, several centers, Allreduce."""

import numpy as np
import pytest

from agnmpi import AGNOptimizer
from agnmpi.core import rules
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError

pytestmark = pytest.mark.mpi(min_size=2)

TRANSPORTS = {
    "p2p": registry.p2p(),
    "rma": registry.rma(),
    "p2p, two centers": registry.p2p(centers=2),
    "allreduce": registry.allreduce(),
}
STEPS, SIZE = 8, 5  # per rank; of w and of each buffer: with two centers the cut lies in the first buffer


@pytest.mark.parametrize("case", TRANSPORTS)
def test_what_all_have_put_in_bounds_what_all_get(comm, case):
    transport = TRANSPORTS[case]
    if transport.workers_among(comm.size) < 1:
        pytest.skip("too few ranks for these centers")
    together = transport.capabilities.together
    rule = rules.synchronous() if together else rules.weighted(rules.agn(), rules.outer_rate(0.5))
    start = {"mean": np.full(SIZE, 2.0), "w": np.zeros(SIZE), "var": np.full(SIZE, 10.0)}
    own = {name: array + 0.0 for name, array in start.items()}
    with AGNOptimizer(None, own, comm, 2, rule=rule, transport=transport, buffers=("mean", "var")) as opt:
        workers = opt.num_workers
        for step in opt.steps(STEPS * workers):
            assert (own["mean"] <= 2 * SIZE + comm.size).all()
            own["w"] += 1.0
            own["mean"][:] = 2 + np.arange(SIZE) + comm.rank % 2
            own["var"][:] = 10.0 + step % 4
            opt.step()
        center = {name: array.copy() for name, array in opt.center.items()}
    assert (center["w"] > 0).all()
    assert (center["mean"] >= 2).all()
    assert (center["mean"] <= 3 + np.arange(SIZE)).all()
    assert (center["mean"][1:] > 2).all()
    assert (center["var"] >= 10).all()
    assert (center["var"] <= 13).all()
    for array in center.values():
        assert comm.bcast(array.tolist()) == array.tolist(), "all ranks end with the center"


def test_sums_without_a_center_are_refused(comm):
    params = {"w": np.zeros(3), "mean": np.zeros(2)}
    with pytest.raises(ConfigError, match="GroupNorm"):
        AGNOptimizer(None, params, comm, transport="accumulate", use_locking=False, buffers=("mean",))
