"""A loop of one's own that is disturbed at a turn of its first worker; started again, it goes on where it was.

mpiexec -n 2 python tests/support/own_loop_resumes.py DIRECTORY nothing|USR1|Ctrl-C|exception|full TURN
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from agnmpi import AGNOptimizer, adam, schedules

COMM = MPI.COMM_WORLD
LOOPS, STEPS = 2, 200


def fill_disk(pids):
    """No rank can write more than some bytes to a file any more."""
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def main():
    directory, how, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pids, turn, target = COMM.allgather(os.getpid()), 0, np.linspace(-1, 1, 50)

    def disturb():
        if how == "USR1" and turn == at:
            os.kill(os.getpid(), signal.SIGUSR1)
        elif how == "Ctrl-C" and turn == at:
            (directory / "now").touch()  # whoever has started this presses it
        elif how == "full" and turn == at:
            fill_disk(pids)
        elif (how == "exception" and turn == at) or (how == "full" and turn == at + 20):
            raise RuntimeError("this run was disturbed")

    options = {} if how == "nothing" else {"checkpoint": directory, "resume": "auto", "checkpoint_every": 0.01}
    opt = AGNOptimizer(adam(schedules.cosine(0.1, LOOPS * STEPS)), np.zeros(50), COMM, 5, **options)
    if COMM.rank == 0:
        print("begins at", opt.status.step, flush=True)
    for loop in range(LOOPS):
        for step in opt.steps(STEPS):
            noise = np.random.default_rng((loop, step)).normal(size=50)
            opt.minimize(lambda p, noise=noise: (0.0, {"0": p["0"] - target + noise}))
            turn += 1
            if COMM.rank == 1:
                disturb()
            pressed = how == "Ctrl-C" and (directory / "now").exists()
            time.sleep(0.1 if pressed else 0.004)  # it is not done before it is disturbed
    opt.close()
    assert abs(opt.center["0"] - target).max() < 1
    if COMM.rank == 0:
        print("ends at", opt.status.step, "with", opt.clock, opt.center["0"].tobytes().hex(), flush=True)


if __name__ == "__main__":
    main()
