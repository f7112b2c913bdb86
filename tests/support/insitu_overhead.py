"""How much a run in situ slows a solver: mpiexec -n 2 python tests/support/insitu_overhead.py BUDGET GRID [CENTER].

Time steps of examples/heat2d with `put`, `learn` and `done`, in turn with the same steps without them: the median of 15
rounds (or a fourth number), each as long as its slowest rank. It is a share of the time of the solver alone; the budget
is part of it. Then what each call takes of a core, in the mean, as a share of a time step: on a busy machine, too.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from mpi4py import MPI

HEAT = Path(__file__).parent.parent.parent / "examples/heat2d"
sys.path.insert(0, str(HEAT))
STEPS = 200


def main(budget, grid, center="solver", rounds="15"):
    from heat import Plate

    from agnmpi import insitu

    comm = MPI.COMM_WORLD.Dup()
    plate, slowed, alone = Plate(comm, int(grid)), [], []
    run = insitu.Run(f"{HEAT}/surrogate.py:Heat", MPI.COMM_WORLD, center=center)
    x, _ = plate.samples(1.0)
    few = np.random.default_rng(comm.rank).integers(0, len(x), 256)  # what is offered of each time step
    places, points = x[few], np.unravel_index(few, plate.inner.shape)

    def trained():
        plate.step()
        run.put(places, plate.inner[points])
        run.learn(float(budget))
        return run.done

    def in_parts():
        """A time step, and the seconds of a core that each part of it takes."""
        taken, last = [], time.thread_time()
        for part in (
            plate.step,
            lambda: samples.append((places, plate.inner[points])),
            lambda: run.put(*samples.pop()),
            lambda: run.learn(float(budget)),
            lambda: run.done,
        ):
            part()
            now = time.thread_time()
            taken.append(now - last)
            last = now
        return taken

    samples = []

    def seconds(turn):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            turn()
        comm.Barrier()
        return time.perf_counter() - start

    for _ in range(int(rounds)):
        alone.append(seconds(plate.step))
        run.learn(0.0)  # the time of these steps grants none
        slowed.append(seconds(trained) / alone[-1] - 1)
    means = np.mean([in_parts() for _ in range(3 * STEPS)], axis=0)
    run.close()
    slowest = np.max(comm.allgather(means[1:] / means[0]), axis=0)
    if comm.rank == 0:
        low, high = np.quantile(slowed, (0.25, 0.75))
        print(
            f"{comm.size} ranks, time steps of {1000 * median(alone) / STEPS:.2f} ms, budget {float(budget):.1%}: "
            f"slower by {median(slowed):.2%} (quartiles {low:.2%}, {high:.2%}); {run.status.steps} steps of rank 0"
        )
        names = ("to draw samples", "put", "learn", "done")
        print(", ".join(f"{name} {share:.2%}" for name, share in zip(names, slowest)), "of a core (the slowest rank)")


if __name__ == "__main__":
    main(*sys.argv[1:])
