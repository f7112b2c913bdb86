"""AGNOptimizer in a loop of your own: every rank runs this script, and together they learn that y = 3x.

mpiexec -n 4 python examples/own_loop.py
"""

import numpy as np
from mpi4py import MPI

from agnmpi import AGNOptimizer, sgd

comm = MPI.COMM_WORLD
x = np.random.default_rng(0).normal(size=4096)
y = 3 * x

opt = AGNOptimizer(
    sgd(0.1),
    {"w": np.zeros(1)},
    comm,
    communication_period=5,
    transport="auto" if comm.size > 1 else "local",  # a single rank is center and worker in one
)

for step in opt.steps(2000):  # the steps of all workers together; on rank 0 this serves the center
    batch = np.arange(step * 32, (step + 1) * 32) % len(x)

    def loss(p, batch=batch):  # value and gradients, by name
        error = x[batch] * p["w"] - y[batch]
        return (error**2).mean() / 2, {"w": (error * x[batch]).mean(keepdims=True)}

    opt.minimize(loss)

w = opt.center["w"][0]  # of the final center, on every rank
if comm.rank == 0:
    print(f"workers: {opt.num_workers}, commits: {opt.clock}, w = {w:.4f}")
opt.close()
