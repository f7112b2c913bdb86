"""Two simulations feed one network; the second dies: mpiexec --with-ft ulfm -n 6 python tests/support/insitu_losses.py.

Rank 0 serves, rank 1 trains; ranks 2 and 3, and 4 and 5, are solvers, which send their samples to rank 1, and read; or,
given "train", train on them.
"""

import os
import signal
import sys
import time

import mpi4py

mpi4py.rc.thread_level = "serialized"  # as agnmpi's own command line

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402
from surrogates import Mean, Ring  # noqa: E402

from agnmpi import insitu, sgd  # noqa: E402

STEPS, DIES_AT = 400, 40  # time steps of each simulation


def main(does="feed"):
    world = MPI.COMM_WORLD
    solver = world.Split((0, 1, 2, 2, 3, 3)[world.rank], world.rank)
    solver.Set_errhandler(MPI.ERRORS_RETURN)
    computes, dies = world.rank > 1, world.rank > 3
    run = insitu.Run(
        Mean(1000), world, 2, "rank", optimizer=sgd(0.1), batch=4, feeds=computes and does == "feed", solver=solver
    )
    if run.is_center:
        for _ in run.serve(0.2):
            pass
    elif not computes:
        while not run.done:  # alone in its solver: with samples from those that feed, or with its own
            if does != "feed":
                run.put(np.zeros(1), np.ones(1))
                if run.status.all_steps > 3 * STEPS:
                    run.stop()
            if not run.learn(1e9, most=2):
                time.sleep(1e-3)
    else:
        ring = Ring(solver)
        for t in range(STEPS):
            if dies and t == DIES_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            ring.step()
            run.put(np.zeros(2), np.ones(2))
            run.pull() if does == "feed" else run.learn(1e9, most=2)
            time.sleep(2e-3)
            if run.done:
                break
        print(f"rank {world.rank}: {t + 1} time steps", flush=True)
    run.close()
    status = run.status
    print(f"rank {world.rank} ends: clock {status.clock}, w {run.params['w'][0]:.3f}", flush=True)
    os._exit(0)  # MPI cannot be finalized where ranks have died


if __name__ == "__main__":
    main(*sys.argv[1:])
