"""What AGNOptimizers leave behind in a process that makes many of them, one after the other."""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from agnmpi import AGNOptimizer, sgd
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=3)

TRANSPORTS = {
    "p2p": registry.p2p(),
    "two centers": registry.p2p(centers=2),
    "rma": registry.rma(),
    "accumulate": registry.accumulate(),
}
PROBES = 32  # more communicators than one optimizer makes


def make(comm, transport, count):
    """Make, use and close `count` optimizers."""
    for _ in range(count):
        with closing(AGNOptimizer(sgd(0.1), [np.zeros(16)], comm, 2, transport=transport)) as opt:
            for _step in opt.steps(2 * comm.size):
                opt.minimize(lambda p: (1.0, {name: -np.ones_like(x) for name, x in p.items()}))


def handles(comm):
    """The numbers of new communicators: those of freed ones, which MPI uses again, before any other."""
    duplicates = [comm.Dup() for _ in range(PROBES)]
    numbers = {duplicate.py2f() for duplicate in duplicates}
    for duplicate in reversed(duplicates):
        duplicate.Free()
    return numbers


def held():
    """What this process holds: memory in MiB, descriptors, threads, mappings."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors, threads = (sum(1 for _ in Path(f"/proc/self/{kind}").iterdir()) for kind in ("fd", "task"))
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors, threads, mappings


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS)
def test_closed_optimizers_leave_no_communicator(comm, transport):
    make(comm, transport, 1)
    before, many = handles(comm), 4
    make(comm, transport, many)
    assert len(handles(comm) - before) < many  # MPICH's windows exchange one with the pool


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_thousands_of_optimizers(comm, kind):
    make(comm, TRANSPORTS[kind], 50)  # modules, pools, caches
    memory, *counts = held()
    make(comm, TRANSPORTS[kind], 500 if kind in ("rma", "accumulate") else 2000)
    now, *counts_now = held()
    assert now < memory + 8, f"from {memory:.1f} to {now:.1f} MiB"
    assert all(after <= count + 8 for count, after in zip(counts, counts_now)), (counts, counts_now)
