"""What AGNOptimizers leave behind in a process that makes many of them, or exchanges for long."""

import os
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from agnmpi import AGNOptimizer, Monitoring, adam, sgd
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=3)

TRANSPORTS = {
    "p2p": registry.p2p(),
    "two centers": registry.p2p(centers=2),
    "rma": registry.rma(),
    "accumulate": registry.accumulate(),
}
ENCODED = {"encoding": "int8", "pull_encoding": "int8"}
EVERYTHING = {
    "p2p": registry.p2p(**ENCODED),
    "two centers": registry.p2p(centers=2, **ENCODED),
    "rma": registry.rma(**ENCODED),
    "accumulate": registry.accumulate(),
}
EXCHANGES, SECONDS = 20_000, 150  # of each of these, at least
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
    """What this process holds: memory in MiB, of it shared, descriptors, threads, mappings."""
    pages = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    descriptors, threads = (sum(1 for _ in Path(f"/proc/self/{kind}").iterdir()) for kind in ("fd", "task"))
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return *(count * os.sysconf("SC_PAGE_SIZE") / 2**20 for count in pages), descriptors, threads, mappings


def check_level(before):
    """What this process holds has not grown since."""
    now = held()
    assert all(after < held_before + 8 for after, held_before in zip(now, before)), (before, now)


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
    before = held()
    make(comm, TRANSPORTS[kind], 500 if kind in ("rma", "accumulate") else 2000)
    check_level(before)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_soak_with_everything_on(comm, tmp_path, kind):
    """Encodings, overlap, checkpoints each second, evaluations, events: ten minutes of all four kinds."""
    directory, seen = Path(comm.bcast(str(tmp_path))), []
    shown = Monitoring(directory, lambda p: {"w": float(p["0"].mean())}, every=200, metric="w:max", writers="csv")
    opt = AGNOptimizer(
        adam(1e-3), [np.zeros(5000)], comm, 1, transport=EVERYTHING[kind], overlap=True, checkpoint=directory,
        checkpoint_every=1, monitor=shown,
    )  # fmt: skip
    numbers, before, exchanges, began = None, None, 0, time.monotonic()
    while comm.bcast(exchanges < EXCHANGES or time.monotonic() < began + SECONDS):
        for _step in opt.steps(1000, at_center=lambda status: seen.append(status.clock), every=250):
            opt.minimize(lambda p: (1.0, {"0": -np.ones(5000)}))
        opt.finish()
        exchanges += 1000
        if exchanges == EXCHANGES // 5:  # modules, pools, caches
            before, numbers = held(), handles(comm)
    check_level(before)
    assert len(handles(comm) - numbers) < 2
    opt.close()
    assert comm.allreduce(len(seen)) >= exchanges / 1000
