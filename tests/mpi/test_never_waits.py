"""Workers that do not wait for their exchanges, under mpiexec, by every transport."""

import time

import numpy as np
import pytest

from agnmpi import AGNOptimizer, sgd, transports
from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup
from agnmpi.core import rules
from agnmpi.core.observer import Observer

pytestmark = pytest.mark.mpi(min_size=2)

TOTAL, PERIOD = 240, 2
ALL = {
    "p2p": transports.p2p(),
    "rma": transports.rma(),
    "accumulate": transports.accumulate(),
    "p2p-int8": transports.p2p(encoding="int8", pull_encoding="int8"),
    "p2p-2-centers": transports.p2p(centers=2),
    "rma-2-centers": transports.rma(centers=2),
}


class SlowCenter(Observer):
    """Takes 50 ms for each commit."""

    def __init__(self):
        self.commits = []

    def committed(self, commit, c):
        self.commits.append(commit._replace(payload=None))
        time.sleep(0.05)


@pytest.mark.parametrize("transport", ["p2p", "rma"])
def test_a_slow_center_makes_longer_periods_and_every_step_counts_once(comm, transport):
    """Steps of 1 ms, λ = 2: the answer is there after some 50, but a worker holds 16."""
    observer = SlowCenter()
    role = connect(
        comm, rules.downpour(), np.zeros(TOTAL), sgd(1.0), setup=Setup(ALL[transport], overlap=True, wait=False),
        observer=observer,
    )  # fmt: skip
    role.begin(TOTAL, PERIOD)
    if role.serves:
        role.serve()
    for worker in role.workers:
        for step in worker.steps():
            time.sleep(0.001)
            worker.step(-(np.arange(TOTAL) == step).astype(float))
        np.testing.assert_array_equal(worker.x, 1)
    if role.serves:
        np.testing.assert_array_equal(role.c, 1)
        leases = [lease for commit in observer.commits for lease in commit.leases]
        steps = [step for lease in leases for step in range(lease.first, lease.first + lease.steps)]
        assert sorted(steps) == list(range(TOTAL))
        longest = max(commit.steps for commit in observer.commits)
        assert PERIOD < longest <= 8 * PERIOD
        assert role.center.steps / role.center.clock > PERIOD
    role.close()
    comm.Barrier()


@pytest.mark.parametrize("transport", ALL)
def test_own_loops_take_each_step_once(comm, transport):
    """Two loops, of which the second is left early; the clock is the center's, and all end with the same center."""
    if comm.size <= ALL[transport].centers:
        pytest.skip("needs a worker")
    exact = transport != "p2p-int8"
    rule = rules.downpour()
    with AGNOptimizer(None, (x := np.zeros(TOTAL)), comm, 3, rule=rule, transport=ALL[transport], wait=False) as opt:
        mine = []
        for step in opt.steps(TOTAL):
            assert opt.granted[0] == step
            x[step] += 1
            mine.append(step)
            opt.step()
        everyone = sorted(step for steps in comm.allgather(mine) for step in steps)
        assert everyone == list(range(TOTAL))
        (center,) = opt.center.values()
        np.testing.assert_allclose(center, 1, atol=0 if exact else 0.1)
        assert opt.status.step == TOTAL
        for taken, _ in enumerate(opt.steps()):
            opt.step()
            if taken == 7:
                break
        opt.finish()
        assert len(set(comm.allgather(opt.clock))) == 1


@pytest.mark.parametrize(
    ("rule", "transport", "said"),
    [(rules.synchronous(), "auto", "all ranks at once"), (rules.aeasgd(0.5), "p2p", "takes two exchanges")],
    ids=["synchronous", "aeasgd"],
)
def test_refusals_are_for_all_ranks(comm, rule, transport, said):
    with pytest.raises(ValueError, match=said):
        AGNOptimizer(sgd(0.1), np.zeros(3), comm, rule=rule, transport=transport, wait=False)
