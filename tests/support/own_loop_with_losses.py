"""A loop of one's own in which ranks die, center or worker.

DEATHS is RANK@LOOP.AT,…: at the AT-th step (of rank 0: commit) of that rank in that loop. SPARES: how many wait.

mpiexec --with-ft ulfm -n 4 python tests/support/own_loop_with_losses.py 0@1.20,2@2.7 0 DIRECTORY
"""

import os
import signal
import sys
import time
import warnings

import mpi4py

mpi4py.rc.thread_level = "serialized"  # as agnmpi's own command line

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from agnmpi import AGNOptimizer, Monitoring, rules, sgd, transports  # noqa: E402

TOTAL, LOOPS = 600, 2


def main(deaths, spares, directory):
    warnings.simplefilter("always")
    rank = MPI.COMM_WORLD.rank
    victims = dict(death.split("@") for death in deaths.split(","))
    mine = [int(number) for number in victims.get(str(rank), "0.0").split(".")]
    at = [0, 0]  # loop, step
    seen = []  # n, by commit

    def die_if_due():
        at[1] += 1
        if at == mine:
            os.kill(os.getpid(), signal.SIGKILL)

    def weigh(commit):  # called at the center with each commit
        seen.append(commit.workers)
        if rank == 0:
            die_if_due()
        return 1.0

    # Gradient -1 at a rate of 1: each step of a period moves the center by 1/λ.
    rule = rules.weighted(rules.agn(), weigh)
    shown = Monitoring(directory, lambda p: {"w": float(p["w"][0])}, every=150)
    opt = AGNOptimizer(
        sgd(1.0), {"w": np.zeros(3)}, MPI.COMM_WORLD, communication_period=3, rule=rule,
        transport=transports.p2p(spares=spares), monitor=shown,
    )  # fmt: skip
    for loop in range(1, LOOPS + 1):
        at[:] = loop, 0
        for _step in opt.steps(TOTAL):
            die_if_due()
            if mine[0] != loop:
                time.sleep(1e-3)  # who dies in this loop comes to its step, whoever gets the cores
            opt.minimize(lambda p: (0.0, {"w": -np.ones(3)}))
    w, clock = opt.center["w"], opt.global_step
    # Whole: every commit of the clock is in the center, each of mean length 1.
    assert w.tolist() == [clock] * 3, (w, clock)
    if seen and opt.is_center:  # n counts who is alive; a spare takes the place of a lost worker
        assert seen[-1] == max(1, min(MPI.COMM_WORLD.size - 1 - spares, opt.comm.size - 1)), seen
    facts = f"clock {clock}, center rank {opt.is_center}, {opt.comm.size} left, {at[1]} steps at last"
    print(f"rank {rank}: {facts}", flush=True)
    opt.comm.Barrier()
    lost = opt.comm.size < MPI.COMM_WORLD.size
    opt.close()
    if lost:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
