"""The conformance suite over every transport, wire and number of centers, at the sizes of world that mpiexec gives."""

import pytest
from conformance import CHECKS, SIZES, declared, nothing_lost_nothing_twice
from worlds import MPIWorld

from agnmpi.cluster.setup import Setup

pytestmark = pytest.mark.mpi(min_size=2)

WORLDS = {
    "p2p-1-slot": (Setup("p2p", slots=1), False),
    "p2p": (Setup("p2p"), False),
    "p2p-staged": (Setup("p2p"), True),
    "p2p-2-centers": (Setup("p2p", centers=2), False),
    "rma": (Setup("rma"), False),
    "rma-staged": (Setup("rma"), True),
    "rma-2-centers": (Setup("rma", centers=2), False),
    "accumulate": (Setup("rma", use_locking=False), False),
    "accumulate-staged": (Setup("rma", use_locking=False), True),
    "accumulate-2-centers": (Setup("rma", use_locking=False, centers=2), False),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", SIZES)
def test_conformance(comm, check, world, n):
    setup, on_fake_device = WORLDS[world]
    if n != SIZES[1] and comm.size > 3:
        pytest.skip("one number, and 24 MB: covered with fewer ranks")
    if setup.centers > 1 and (n < setup.centers or comm.size <= setup.centers):
        pytest.skip("needs a parameter for each center, and a worker")
    made = MPIWorld(comm, setup, on_fake_device)
    if not declared(made, check):
        pytest.skip(f"{world} does not declare what this needs")
    check(made, n)


@pytest.mark.long
@pytest.mark.parametrize("world", ["p2p", "rma", "accumulate"])
def test_ten_million_numbers(comm, world):
    nothing_lost_nothing_twice(MPIWorld(comm, WORLDS[world][0]), 10**7)
