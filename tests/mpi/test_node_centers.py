"""Node centers, with the ranks of this machine placed on hosts that are told."""

from dataclasses import replace

import numpy as np
import pytest

from agnmpi import AGNOptimizer, adam, sgd, transports
from agnmpi.cluster.placement import node_centers
from agnmpi.core import rules

pytestmark = pytest.mark.mpi(min_size=4)

# The host of each rank, in a world of `size`.
PLACEMENTS = {
    "two hosts": lambda size: [int(rank >= size - 3) for rank in range(size)],
    "rank 0 alone": lambda size: [min(rank, 1) for rank in range(size)],
    "cyclic": lambda size: [rank % 2 for rank in range(size)],
    "a lone worker": lambda size: [0, 2, *[1] * (size - 2)],
    "one host": lambda size: [0] * size,
}
SAMPLES = 64


@pytest.fixture
def placed(monkeypatch, comm):
    """Place the ranks: returns the groups of the hosts that have a node center."""

    def place(name):
        hosts = PLACEMENTS[name](comm.size)
        monkeypatch.setattr("agnmpi.cluster.setup.hosts", lambda comm: hosts)
        return node_centers(hosts)

    return place


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_sample_is_committed_once_and_every_rank_has_the_sum(comm, placed, name, overlap):
    """Element i counts how often step i was committed; the workers move x themselves."""
    groups = placed(name)
    serving = [0, *(node for node, *_ in groups)]
    x = np.full(SAMPLES, float(comm.rank))
    x[:] = 0 if comm.rank == 0 else x
    transport = transports.p2p(node_centers=True)
    with AGNOptimizer(None, x, comm, 3, rule=rules.downpour(), transport=transport, overlap=overlap) as opt:
        for session, total in enumerate((50, 7, SAMPLES, 0), 1):
            taken = []
            for step in opt.steps(total):
                x[step] += 1
                opt.step()
                taken.append(step)
            everyone = comm.allgather(taken)
            assert sorted(step for steps in everyone for step in steps) == list(range(total))
            if session == 1:
                expected = np.zeros(SAMPLES)
            expected[:total] += 1
            np.testing.assert_array_equal(opt.center["0"] if "0" in opt.center else next(iter(opt.center.values())), expected)
            np.testing.assert_array_equal(x, expected)
            assert not (comm.rank in serving and taken)
            assert len(set(comm.allgather(opt.global_step))) == 1
        assert opt.is_center == (comm.rank in serving)
        assert opt.num_workers == comm.size - len(serving)
