"""Exchanges of large vectors with known sums, each transport in turn; rank 0 goes away while bytes are on their way.

(On one host, those of transports with windows need no rank 0, and it stays.)

mpiexec -n 4 python tests/support/large_sums.py N COMMITS AWAY [TRANSPORT …]

N float32 numbers, COMMITS of each worker, AWAY seconds; all transports with a center if none is named.
"""

import sys
import time

import mpi4py

mpi4py.rc.thread_level = "serialized"  # as agnmpi's own command line

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from agnmpi.cluster.connect import connect  # noqa: E402
from agnmpi.cluster.setup import Setup  # noqa: E402
from agnmpi.core import rules  # noqa: E402
from agnmpi.core.messages import Commit  # noqa: E402
from agnmpi.training.abort import say_and_abort  # noqa: E402
from agnmpi.transport.registry import entries, resolve  # noqa: E402


def go_away(end, seconds):
    """Let the center sleep once, as soon as it sees that something is under way."""
    serve_one, left = end.serve_one, [seconds]

    def late(apply):
        served = serve_one(apply)
        if left and end.progress:
            print("rank 0 is away", flush=True)
            time.sleep(left.pop())
        return served

    end.serve_one = late


def main(comm, n, commits, away, *names):
    for name in names or [entry.name for entry in entries() if entry.capabilities.center_ranks]:
        start, transport = time.perf_counter(), resolve(name)
        role = connect(comm, rules.agn(), np.zeros(n, np.float32), None, setup=Setup(transport))
        if not transport.capabilities.single_commits:  # the ends count; elsewhere commits without leases do
            role.begin(None, 1)
        if role.serves:
            go_away(role.end, away)
            role.serve()
            final = role.c
        else:
            (worker,) = role.workers
            final, payload = np.empty(n, np.float32), np.full(n, comm.rank, np.float32)
            for k in range(1, commits + 1):
                worker.end.exchange(Commit(worker.index, k, steps=1, payload=payload), final).wait()
                own = k * comm.rank
                assert final.min() >= own, f"{name}: rank {comm.rank} misses a commit of its own"
            worker.end.leave(None, final).wait()
        expected = commits * sum(range(1, comm.size))
        assert (final == expected).all(), f"{name}: rank {comm.rank} holds {final[final != expected]}, not {expected}"
        role.close()
        if comm.rank == 0:
            print(f"{name}: right, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main(MPI.COMM_WORLD.Dup(), *map(int, sys.argv[1:3]), float(sys.argv[3]), *sys.argv[4:])
    except Exception as error:
        say_and_abort(MPI.COMM_WORLD, error)
