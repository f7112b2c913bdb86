import json
import os
import sys
from pathlib import Path

import pytest
from mpi4py import MPI


@pytest.fixture
def comm():
    """A communicator of our own with all ranks."""
    comm = MPI.COMM_WORLD.Dup()
    yield comm
    comm.Free()


def pytest_runtest_logreport(report):
    """A failure on one rank is the failure of all: else the others would wait for it."""
    world = MPI.COMM_WORLD
    if report.failed and world.size > 1:
        sys.stderr.write(f"\nrank {world.rank} of {world.size} failed {report.nodeid}\n{report.longreprtext}\n")
        sys.stderr.flush()
        world.Abort(1)


def pytest_sessionfinish(session):
    """Tell the test that started us how many tests each rank ran; what the ranks print may be interleaved."""
    counts = MPI.COMM_WORLD.allgather(session.testscollected)
    if MPI.COMM_WORLD.rank == 0 and "AGNMPI_TEST_COUNTS" in os.environ:
        Path(os.environ["AGNMPI_TEST_COUNTS"]).write_text(json.dumps(counts))
