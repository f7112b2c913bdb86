"""The heat equation on a plate, and a surrogate of it that is trained while it runs.

    mpiexec -n 3 python examples/heat2d/heat.py --picture heat.png

Each rank has some rows of the plate, and exchanges their edges with its neighbours on a communicator of the solver's
own. The four lines that mention `run` are all that the training changes.
"""

import argparse
from hashlib import sha256
from pathlib import Path

import numpy as np
from draw import draw
from mpi4py import MPI

from agnmpi import adam, insitu


class Plate:
    """dT/dt = ∇²T on the unit square, T = 0 on its edge: explicit steps, this rank's rows with a halo at each side."""

    def __init__(self, comm, n):
        self.comm, self.n, self.t = comm, n, 0.0
        self.h = 1 / (n + 1)
        self.dt = self.h**2 / 5
        rows = range(comm.rank * n // comm.size, (comm.rank + 1) * n // comm.size)
        y, x = np.meshgrid((np.array(rows) + 1) * self.h, (np.arange(n) + 1) * self.h, indexing="ij")
        self.places = np.stack([x, y], axis=-1)  # (rows, n, 2)
        self.field = np.zeros((len(rows) + 2, n + 2))
        self.inner[...] = sum(5 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.03) for a, b in ((0.3, 0.3), (0.6, 0.75)))

    @property
    def inner(self):
        return self.field[1:-1, 1:-1]

    def step(self):
        up = self.comm.rank - 1 if self.comm.rank > 0 else MPI.PROC_NULL
        down = self.comm.rank + 1 if self.comm.rank < self.comm.size - 1 else MPI.PROC_NULL
        self.comm.Sendrecv(self.field[1], up, 0, self.field[-1], down, 0)
        self.comm.Sendrecv(self.field[-2], down, 1, self.field[0], up, 1)
        f = self.field
        self.inner[...] += (
            self.dt / self.h**2 * (f[:-2, 1:-1] + f[2:, 1:-1] + f[1:-1, :-2] + f[1:-1, 2:] - 4 * self.inner)
        )
        self.t += self.dt

    def samples(self, end):
        """All places of this rank at the time now, as (x, y, t/end), and the temperatures there."""
        places = self.places.reshape(-1, 2)
        return np.column_stack([places, np.full(len(places), self.t / end)]), self.inner.flatten()

    def whole(self):
        """The plate, on rank 0."""
        parts = self.comm.gather(self.inner.copy())
        return np.concatenate(parts) if parts else None


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--grid", type=int, default=48)
    parser.add_argument("--time-steps", type=int, default=600)
    parser.add_argument("--train", type=int, default=9000, help="steps over all ranks; 0: the solver alone")
    parser.add_argument("--budget", type=float, default=0.02, help="of the solver's time")
    parser.add_argument("--save", help="safetensors file for the surrogate")
    parser.add_argument("--picture", help="PNG file: prediction against truth (matplotlib)")
    return parser.parse_args()


def main():
    given = arguments()
    comm = MPI.COMM_WORLD.Dup()  # the solver's own
    plate = Plate(comm, given.grid)
    end = given.time_steps * plate.dt
    run = None
    if given.train:
        spec = f"{Path(__file__).parent}/surrogate.py:Heat"
        run = insitu.Run(spec, MPI.COMM_WORLD, 10, steps=given.train, optimizer=adam(0.003), capacity=20_000)
    seen = []  # for the error: what the solver computed at some times
    for k in range(given.time_steps):
        plate.step()
        if run:
            run.put(*plate.samples(end))
            run.learn(given.budget)
        if (k + 1) % (given.time_steps // 5) == 0:
            seen.append(plate.samples(end))
    truth = plate.whole()
    if comm.rank == 0:
        print(f"plate {sha256(truth.tobytes()).hexdigest()}, {given.time_steps} steps", flush=True)
    if run:
        in_time = run.status
        while not run.done:  # the plate is ready: what is left of the steps, on what the reservoirs hold
            run.learn(1.0)
        run.close(given.save)
        report(run, comm, in_time, seen)
        places = comm.gather(plate.samples(end)[0])
        if given.picture and places:
            draw(given.picture, truth, run.predict(np.concatenate(places)).reshape(truth.shape))


def report(run, comm, in_time, seen):
    """Print the error of the surrogate against that of the mean, over what the solver computed."""
    x, y = (np.concatenate(parts) for parts in zip(*seen))
    total = comm.allreduce(np.array([len(y), y.sum(), (y**2).sum(), ((run.predict(x) - y) ** 2).sum()]))
    variance = total[2] / total[0] - (total[1] / total[0]) ** 2
    taken = comm.gather((in_time.steps, in_time.used))
    if comm.rank == 0:
        error = (total[3] / total[0] / variance) ** 0.5
        print(f"while the plate was computed: steps of each rank and share of its time {taken}")
        print(f"error of the surrogate: {error:.3f} of the mean's, after {run.status.all_steps} steps")


if __name__ == "__main__":
    main()
