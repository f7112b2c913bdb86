"""A loop of one's own that gets USR1 at the 5th step of each worker, unless it is resumed from its DIRECTORY.

mpiexec -n 3 python tests/support/own_loop_with_signal.py DIRECTORY
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from agnmpi import AGNOptimizer, sgd

fresh = not Path(sys.argv[1]).is_dir()
MPI.COMM_WORLD.Barrier()
opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(3)}, MPI.COMM_WORLD, 2, checkpoint=sys.argv[1], resume="auto")
for count, _ in enumerate(opt.steps(400)):
    opt.minimize(lambda p: (0.0, {"w": p["w"] - 1}))
    if fresh and count == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
print(f"rank {MPI.COMM_WORLD.rank}: {opt.status.step} steps", flush=True)
opt.close()
