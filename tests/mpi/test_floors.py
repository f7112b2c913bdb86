"""The floors of `agnmpi bench` move the bytes that they are compared for: each worker gets c with its delta in it."""

import numpy as np
import pytest

from agnmpi.bench.floors import make_floor

COUNT = 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("n", [1, 1000, 1025, 50_000])
@pytest.mark.parametrize("name", ["two-sided", "mailbox", "sum", "allreduce"])
def test_deltas_arrive(comm, name, n):
    together = name == "allreduce"
    trains = together or comm.rank > 0
    with make_floor(name, comm, np.ones(n, np.float32)) as floor:
        times = floor.exchanges(COUNT)
        pulled = floor.c if together else floor.out
        ends = pulled[[0, -1]] if trains else np.zeros(2, np.float32)
    assert len(times) == COUNT * trains
    newest = COUNT if together else COUNT * (comm.size - 1)  # the mean of ones; the last one has all deltas
    assert np.array(comm.allgather(ends)).max(axis=0).tolist() == [newest, newest]
    own = COUNT if trains else 0
    assert ends.min() >= own, "its own deltas are in c"
