"""PyFR, with a plugin that trains an autoencoder of its solution while it runs: otherwise as the command `pyfr`.

    python examples/pyfr/mesh.py box.pyfrm --ranks 2
    mpiexec -n 2 python examples/pyfr/run.py run -b openmp box.pyfrm examples/pyfr/vortex.ini

The plugin is on where the case has a section [soln-plugin-autoencoder]; its options, all of which have a default:
    mode: asynchronous (no rank waits for another), or synchronous (all take each step together)
    budget: share of PyFR's time, 0.02
    nsteps: PyFR's steps between two turns, 50. In a turn all ranks look at their solution, which copies it, and train,
        so that they keep PyFR waiting at the same time
    elements: of a rank, drawn at random, that are offered of each look: to scale them all takes longer, 64
    period: 10;  batch: 64;  rate: 0.002;  code: numbers that an element is reduced to, 8;  file: of the autoencoder
"""

import time

import numpy as np
from autoencoder import Autoencoder
from pyfr.__main__ import main  # first: PyFR initialises MPI itself
from pyfr.mpiutil import get_comm_rank_root, mpi
from pyfr.plugins.base import BaseSolnPlugin

from agnmpi import AGNOptimizer, adam, insitu, rules


class Synchronous:
    """What insitu.Run is, but that all ranks take each step together: Allreduce sums what they did in a period."""

    def __init__(self, model, comm, period, optimizer, batch):
        self.comm, self.model, self.size = comm, model, batch
        self.reservoir = insitu.Reservoir(10_000, np.random.default_rng([0, comm.rank]))
        initial = model.init(np.random.default_rng(0))
        self.opt = AGNOptimizer(optimizer, initial, comm, period, rule=rules.synchronous())
        self.steps = self.opt.steps()
        self.taken, self.spent, self.credit, self.cost = 0, 0.0, 0.0, 0.0
        self.begin = self.since = time.perf_counter()

    def put(self, x, y):
        self.reservoir.put(x, y)

    def learn(self, budget):
        now = time.perf_counter()
        self.credit = min(self.credit, self.cost) + budget * (now - self.since)
        self.since = now
        wanted = int(self.credit / self.cost) if self.cost else 1
        for _ in range(self.comm.allreduce(wanted, op=mpi.MIN)):
            begin = time.perf_counter()
            next(self.steps)
            batch = self.reservoir.batch(self.size)
            self.opt.minimize(lambda params, batch=batch: self.model.gradient(params, *batch))
            taken = time.perf_counter() - begin
            self.credit -= taken
            self.cost = (self.cost + taken) / 2 if self.cost else taken
            self.taken += 1
        self.spent += time.perf_counter() - now

    def predict(self, x):
        return self.model.predict(self.params, x)

    @property
    def params(self):
        return self.opt.center

    def result(self):
        return self.taken * self.comm.size, self.spent / (time.perf_counter() - self.begin)

    def close(self):
        self.steps.close()
        self.opt.finish()
        self.opt.close()


class Asynchronous(insitu.Run):
    """As it is."""

    def result(self):
        return self.status.all_steps, self.status.used


class AutoencoderPlugin(BaseSolnPlugin):
    """Trains an autoencoder of the state of an element: all variables at its solution points, scaled."""

    name = "autoencoder"
    systems = ["*"]
    formulations = ["std", "dual"]
    dimensions = [2, 3]

    def __init__(self, intg, cfgsect, suffix=None):
        super().__init__(intg, cfgsect, suffix)
        self.comm, self.rank, self.root = get_comm_rank_root()
        types = {t for types in self.comm.allgather(intg.system.ele_types) for t in types}
        if len(types) > 1:
            raise ValueError(f"{cfgsect} takes a mesh of one type of elements, not of {', '.join(sorted(types))}")
        self.mode = self.cfg.get(cfgsect, "mode", "asynchronous")
        if self.mode not in ("asynchronous", "synchronous"):
            raise ValueError(f"mode in {cfgsect} is asynchronous or synchronous, not {self.mode}")
        self.budget = self.cfg.getfloat(cfgsect, "budget", 0.02)
        self.every = self.cfg.getint(cfgsect, "nsteps", 50)
        self.elements = self.cfg.getint(cfgsect, "elements", 64)
        self.rng = np.random.default_rng([1, self.rank])
        self.training = None

    def __call__(self, intg):
        if self.training is None:
            self.begin(intg)
        if intg.nacptsteps % self.every == 0:
            x = self.states(intg, self.elements)
            self.training.put(x, x)
            self.training.learn(self.budget)

    def begin(self, intg):
        """Scale by the first solution, and start: collective, as is PyFR's first call of its plugins."""
        (soln,) = intg.soln  # (points, variables, elements)
        n = soln.shape[0] * soln.shape[2]
        n, total, squares = (
            self.comm.allreduce(part) for part in (n, soln.sum(axis=(0, 2)), (soln**2).sum(axis=(0, 2)))
        )
        self.mean = (total / n)[:, None]
        self.deviation = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 1e-12))[:, None]
        model = Autoencoder(soln.shape[0] * self.nvars, self.cfg.getint(self.cfgsect, "code", 8))
        period, batch = self.cfg.getint(self.cfgsect, "period", 10), self.cfg.getint(self.cfgsect, "batch", 64)
        optimizer = adam(self.cfg.getfloat(self.cfgsect, "rate", 0.002))
        kind = Synchronous if self.mode == "synchronous" else Asynchronous
        self.training = kind(model, self.comm, period, optimizer=optimizer, batch=batch)

    def states(self, intg, most=None):
        """One row for each element, (m, points · variables), or for at most so many that are drawn at random."""
        (soln,) = intg.soln
        if most is not None and most < soln.shape[2]:
            soln = soln[:, :, self.rng.choice(soln.shape[2], most, replace=False)]
        scaled = (soln.transpose(2, 0, 1) - self.mean.T) / self.deviation.T
        return scaled.reshape(len(scaled), -1).astype(np.float32)

    def finalise(self, intg):
        """At PyFR's end, also where a plugin ends it: collective."""
        if self.training is None:
            return
        steps, used = self.training.result()
        self.training.close()
        x = self.states(intg)
        error, size = (self.comm.allreduce(s) for s in ((((self.training.predict(x) - x) ** 2).sum(), (x**2).sum())))
        if self.rank == self.root:
            path = self.cfg.getpath(self.cfgsect, "file", "autoencoder.npz", abs=False)
            np.savez(path, mean=self.mean, deviation=self.deviation, **self.training.params)
            print(f"autoencoder ({self.mode}): {steps} steps in {used:.1%} of PyFR's time on rank {self.rank}")
            print(f"what it loses of the solution: {(error / size) ** 0.5:.3f}", flush=True)


if __name__ == "__main__":
    main()
