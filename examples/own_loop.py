"""AGNOptimizer in a loop of your own: linear regression. The same script runs on every rank.

mpiexec -n 4 python examples/own_loop.py
"""

import numpy as np
from mpi4py import MPI

from agnmpi import AGNOptimizer, sgd

rng = np.random.default_rng(0)
x = rng.normal(size=(4096, 20))
truth = rng.normal(size=20)
y = x @ truth + 0.01 * rng.normal(size=4096)

opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(20), "b": np.zeros(1)}, MPI.COMM_WORLD, communication_period=5)

for step in opt.steps(2000):  # steps of all workers together; on rank 0 this serves the center
    batch = np.arange(step * 32, (step + 1) * 32) % len(x)

    def loss(p, batch=batch):
        error = x[batch] @ p["w"] + p["b"] - y[batch]
        return (error**2).mean() / 2, {"w": x[batch].T @ error / 32, "b": error.mean(keepdims=True)}

    opt.minimize(loss)

w = opt.center["w"]  # on every rank
if MPI.COMM_WORLD.rank == 0:
    print(f"{opt.num_worker} workers, {opt.global_step} commits, largest error {abs(w - truth).max():.4f}")
opt.close()
