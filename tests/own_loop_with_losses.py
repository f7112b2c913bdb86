"""A loop of one's own in which ranks die, center or worker: DEATHS is RANK@STEP,… (steps of that rank, or commits).

mpiexec --with-ft ulfm -n 4 python tests/own_loop_with_losses.py 0@20,2@7
"""

import os
import signal
import sys
import warnings

import mpi4py

mpi4py.rc.threads = False

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from agnmpi import AGNOptimizer, sgd  # noqa: E402

TOTAL, LOOPS = 600, 2


def main(deaths):
    warnings.simplefilter("always")
    rank = MPI.COMM_WORLD.rank
    mine = [int(at) for victim, at in (death.split("@") for death in deaths.split(",")) if int(victim) == rank]
    seen = 0

    def die_if_due():
        nonlocal seen
        seen += 1
        if seen in mine:
            os.kill(os.getpid(), signal.SIGKILL)

    # Gradient -1 at a rate of 1: each step of a period moves the center by 1/λ.
    opt = AGNOptimizer(sgd(1.0), {"w": np.zeros(3)}, MPI.COMM_WORLD, communication_period=3)
    if opt.is_center:
        apply = opt._loop.member._apply

        def watched(commit, c):
            reply = apply(commit, c)
            die_if_due()
            return reply

        opt._loop.member._apply = watched
    for _ in range(LOOPS):
        for _step in opt.steps(TOTAL):
            die_if_due()
            opt.minimize(lambda p: (0.0, {"w": -np.ones(3)}))
    w, clock = opt.center["w"], opt.global_step
    # Whole: every commit of the clock is in the center, each of mean length 1.
    assert w.tolist() == [clock] * 3, (w, clock)
    print(f"rank {rank}: clock {clock}, center rank {opt.is_center}, {opt.comm.size} left", flush=True)
    opt.comm.Barrier()
    lost = opt.comm.size < MPI.COMM_WORLD.size
    opt.close()
    if lost:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
