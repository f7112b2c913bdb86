"""How much a run in situ slows a solver: mpiexec -n 2 python tests/support/insitu_overhead.py [BUDGET] [GRID].

Time steps of examples/heat2d with `put`, `learn` and `done`, in turn with the same steps without them: the median of 15
rounds, each as long as its slowest rank. A share of the time of the solver alone; the budget is part of it.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from mpi4py import MPI

HEAT = Path(__file__).parent.parent.parent / "examples/heat2d"
sys.path.insert(0, str(HEAT))
ROUNDS, STEPS = 15, 200


def main(budget="0.02", grid="400"):
    from heat import Plate

    from agnmpi import insitu

    comm = MPI.COMM_WORLD.Dup()
    plate, slowed, alone = Plate(comm, int(grid)), [], []
    run = insitu.Run(f"{HEAT}/surrogate.py:Heat", MPI.COMM_WORLD)
    x, _ = plate.samples(1.0)
    few = np.random.default_rng(comm.rank).integers(0, len(x), 256)  # what is offered of each time step
    points = np.unravel_index(few, plate.inner.shape)

    def trained():
        plate.step()
        run.put(x[few], plate.inner[points])
        run.learn(float(budget))
        return run.done

    def seconds(turn):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            turn()
        comm.Barrier()
        return time.perf_counter() - start

    for _ in range(ROUNDS):
        alone.append(seconds(plate.step))
        slowed.append(seconds(trained) / alone[-1] - 1)
    run.close()
    if comm.rank == 0:
        print(
            f"{comm.size} ranks, time steps of {1000 * median(alone) / STEPS:.2f} ms, budget {float(budget):.1%}: "
            f"slower by {median(slowed):.2%}; {run.status.steps} training steps of rank 0"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
