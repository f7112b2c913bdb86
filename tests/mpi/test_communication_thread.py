"""A worker's exchanges go on while it is outside of MPI."""

import threading
import time
import warnings

import numpy as np
import pytest
from conditions import until_near
from mpi4py import MPI
from worlds import MPIWorld

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster import setup as setups
from agnmpi.core.messages import Commit
from agnmpi.transport import registry as transports

pytestmark = pytest.mark.mpi(min_size=2)
multiple = pytest.mark.skipif(
    MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="MPI was initialized without MPI_THREAD_MULTIPLE"
)


def communication_threads():
    return sum(thread.name == "agnmpi communication" for thread in threading.enumerate())


@multiple
@pytest.mark.parametrize("n", [10, 3_000_000])
@pytest.mark.parametrize("transport", [transports.p2p(), transports.rma()], ids=["p2p", "rma"])
def test_an_exchange_ends_while_its_worker_computes(comm, transport, n):
    def work(end, index):
        out = np.zeros(n)
        handle = end.exchange(Commit(index, 1, steps=1, payload=np.ones(n)), out)
        deadline = time.monotonic() + 60
        while not handle.test():  # only looks whether the thread is done
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert out.min() >= 1
        end.leave(None, out).wait()
        return out

    outcome = MPIWorld(comm, transport, threaded=True).play(n, work)
    for out in outcome.results:
        assert (out == comm.size - 1).all()


@multiple
@pytest.mark.parametrize("transport", ["p2p", "rma"])
def test_a_loop_with_overlap_has_a_thread_and_ends_it(comm, transport):
    with AGNOptimizer(sgd(0.1), {"w": np.zeros(1000)}, comm, 3, transport=transport, overlap=True) as opt:
        for _ in until_near(opt, 1, 0.2):
            for step in opt.steps(200 * (comm.size - 1)):
                opt.minimize(lambda p: (0.0, {"w": p["w"] - 1.0}))
                if step > 40:
                    comm.Iprobe()  # the caller may use MPI meanwhile
                    assert communication_threads() == 1
    assert communication_threads() == 0


def test_a_loop_that_can_have_no_thread_says_so_once(comm, monkeypatch):
    monkeypatch.setattr(setups.MPI, "Query_thread", lambda: MPI.THREAD_FUNNELED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with AGNOptimizer(sgd(0.1), {"w": np.zeros(10)}, comm, 3, overlap=True) as opt:
            for _ in range(2):
                for _ in opt.steps(30):
                    opt.minimize(lambda p: (0.0, {"w": p["w"] - 1.0}))
    said = [str(warning.message) for warning in caught if "overlapping" in str(warning.message)]
    assert len(said) == (comm.rank == 0)
    assert all("MPI4PY_RC_THREAD_LEVEL=multiple" in text for text in said)
    assert communication_threads() == 0
