"""The conformance suite over every transport, wire and number of centers, at the sizes of world that mpiexec gives."""

from dataclasses import replace

import pytest
from conformance import CHECKS, SIZES, commits_of_several_leases, declared, nothing_lost_nothing_twice
from mpi4py import MPI
from worlds import MPIWorld

from agnmpi.arrays.encodings import get
from agnmpi.transport import registry as transports

pytestmark = pytest.mark.mpi(min_size=2)

# Every registered transport that has center ranks, on the host and on a device, in a communication thread, with one
# center and with several.
WORLDS = {"p2p-1-buffer": (transports.p2p(message_buffers=1), {})}
for entry in transports.entries():
    if entry.capabilities.center_ranks:
        WORLDS |= {entry.name: (entry, {}), f"{entry.name}-staged": (entry, {"on_fake_device": True})}
        WORLDS[f"{entry.name}-threaded"] = (entry, {"threaded": True})
    if entry.capabilities.encodings and entry.capabilities.center_ranks:
        WORLDS[f"{entry.name}-bf16"] = (replace(entry, encoding="bf16", pull_encoding="bf16"), {})
    if entry.capabilities.shards:
        WORLDS[f"{entry.name}-2-centers"] = (replace(entry, centers=2), {})
        WORLDS[f"{entry.name}-2-centers-threaded"] = (replace(entry, centers=2), {"threaded": True})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", SIZES)
def test_conformance(comm, check, world, n):
    transport, options = WORLDS[world]
    if n != SIZES[1] and comm.size > 3:
        pytest.skip("one number, and 18 MB: covered with fewer ranks")
    if n == SIZES[2] and comm.size == 2 and check is not nothing_lost_nothing_twice:
        pytest.skip("18 MB of a worker alone: covered with 3 ranks")
    if transport.centers > 1 and (n < transport.centers or comm.size <= transport.centers):
        pytest.skip("needs a parameter for each center, and a worker")
    if options.get("threaded") and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("MPI was initialized without MPI_THREAD_MULTIPLE")
    if options.get("threaded") and n == SIZES[0]:
        pytest.skip("one number: as a thousand")
    if not get(transport.encoding).exact and (check is nothing_lost_nothing_twice or n != SIZES[1]):
        pytest.skip("numbers that bf16 would round, or more than a bf16 of one number; 18 MB: as a thousand")
    if check is commits_of_several_leases and n == SIZES[2]:
        pytest.skip("which steps are whose, whatever the length: as a thousand")
    made = MPIWorld(comm, transport, **options)
    if not declared(made, check):
        pytest.skip(f"{world} does not declare what this needs")
    check(made, n)


@pytest.mark.long
@pytest.mark.parametrize("world", ["p2p", "rma", "accumulate"])
def test_ten_million_numbers(comm, world):
    nothing_lost_nothing_twice(MPIWorld(comm, WORLDS[world][0]), 10**7)
