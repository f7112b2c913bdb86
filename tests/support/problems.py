"""Small problems for the command line: well-behaved, or each broken in one way, some on the last rank only."""

import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
from mlp import MLP


def on_last_rank():
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1


class Quadratic:
    """Mean of (w − sample)²/2 and a bias that is not used: the optimum is the mean of the samples."""

    samples = 240

    def __init__(self, xp=np, dtype="float32", slow=0.0, unused=2):
        self.x = xp.asarray(np.random.default_rng(0).normal(size=(self.samples, 4)), dtype=dtype)
        self.slow, self.unused = slow, unused

    def init(self, rng):
        return {"w": np.asarray(rng.normal(size=4), self.x.dtype), "b": np.zeros(self.unused, self.x.dtype)}

    def gradient(self, params, indices):
        time.sleep(self.slow)
        error = params["w"] - self.x[indices]
        return float((error**2).mean() / 2), {"w": error.mean(axis=0), "b": np.zeros(self.unused, self.x.dtype)}

    def evaluate(self, params):
        return {"distance": float(np.abs(params["w"] - self.x.mean(axis=0)).max())}


class OtherShape(Quadratic):
    def init(self, rng):
        return {"w": np.zeros(4 + on_last_rank(), "f4"), "b": np.zeros(2, "f4")}


class OtherDtype(Quadratic):
    def init(self, rng):
        kind = "f8" if on_last_rank() else "f4"
        return {"w": np.zeros(4, kind), "b": np.zeros(2, kind)}


class OtherNames(Quadratic):
    def init(self, rng):
        return {"v" if on_last_rank() else "w": np.zeros(4, "f4"), "b": np.zeros(2, "f4")}


class OtherOrder(Quadratic):
    def init(self, rng):
        params = super().init(rng)
        return dict(reversed(params.items())) if on_last_rank() else params


class NoData(Quadratic):
    def __init__(self, xp=np):
        super().__init__(xp)
        if on_last_rank():
            open("/nowhere/data.bin")  # noqa: PTH123, SIM115


class WrongGradient(Quadratic):
    def gradient(self, params, indices):
        loss, grads = super().gradient(params, indices)
        return loss, {"w": np.zeros(5), "b": grads["b"]} if on_last_rank() else grads


class Raises(Quadratic):
    def gradient(self, params, indices):
        if on_last_rank():
            raise ArithmeticError("this gradient went wrong")
        return super().gradient(params, indices)


class Exits(Quadratic):
    def gradient(self, params, indices):
        if on_last_rank():
            sys.exit(7)
        return super().gradient(params, indices)


class Diverges(Quadratic):
    def gradient(self, params, indices):
        return float("nan"), super().gradient(params, indices)[1]


class DivergesLater(Quadratic):
    """Each rank's gradients are NaN after its first 24."""

    calls = 0

    def gradient(self, params, indices):
        self.calls += 1
        loss, g = super().gradient(params, indices)
        return loss, {name: x * np.nan for name, x in g.items()} if self.calls > 24 else g


class EvaluationRaises(Quadratic):
    def evaluate(self, params):
        raise ArithmeticError("this evaluation went wrong")


class SecondEvaluationRaises(Quadratic):
    evaluations = 0

    def evaluate(self, params):
        self.evaluations += 1
        if self.evaluations == 2:
            raise ArithmeticError("the second evaluation went wrong")
        return super().evaluate(params)


class SlowEvaluation(Quadratic):
    def evaluate(self, params):
        time.sleep(0.5)
        return super().evaluate(params)


class Timed(Quadratic):
    """Steps of `mean` seconds, of which the part `spread` is an exponential tail; the last rank's `last` times that."""

    def __init__(self, xp=np, mean=0.01, spread=0.0, last=1.0):
        super().__init__(xp)
        self.mean, self.spread = mean * (last if on_last_rank() else 1.0), spread
        self.rng = np.random.default_rng()

    def gradient(self, params, indices):
        self.slow = self.mean * (1 - self.spread + self.spread * self.rng.exponential())
        return super().gradient(params, indices)


class Blobs(MLP):
    """An MLP that tells Gaussian clusters apart: matrix products of the size that BLAS spreads over threads."""

    def __init__(self, xp=np, dtype="float32"):
        rng = np.random.default_rng(0)
        y = rng.integers(10, size=600)
        x = (rng.normal(size=(10, 50))[y] + rng.normal(size=(600, 50))).astype(dtype)
        super().__init__(xp, (x[100:], y[100:]), (x[:100], y[:100]), [100])


class Stuck(Quadratic):
    """A period that takes for ever."""

    def gradient(self, params, indices):
        Path("stuck").touch()
        time.sleep(2)
        return super().gradient(params, indices)


class Spoilt(Quadratic):
    """The gradients for which `spoils(indices)` holds are NaN."""

    def gradient(self, params, indices):
        loss, grads = super().gradient(params, indices)
        return loss, {name: g * np.nan for name, g in grads.items()} if self.spoils(indices) else grads


class SometimesNaN(Spoilt):
    """One of the first gradients of the last rank goes wrong, once.

    Were it each rank's, another might fail at the steps that it takes over: they would be given up.
    """

    calls = 0

    def spoils(self, indices):
        self.calls += 1
        return self.calls == 6 and on_last_rank()


class AlwaysNaN(Spoilt):
    def spoils(self, indices):
        return True


class OneBadSample(Spoilt):
    """The gradient of one sample is NaN, whoever computes it and whenever."""

    def spoils(self, indices):
        return 40 in indices


class Bad(Quadratic):
    """Its first gradient fails, if the option `bad` says so."""

    def __init__(self, xp=np, bad=False, **options):
        super().__init__(xp, **options)
        self.bad = bad

    def gradient(self, params, indices):
        if self.bad:
            raise ArithmeticError("this point went wrong")
        return super().gradient(params, indices)


class FailsLater(Quadratic):
    """On one rank a gradient fails, after some; the option `fails` says at which."""

    calls = 0

    def __init__(self, xp=np, fails=25, **options):
        super().__init__(xp, **options)
        self.fails = fails

    def gradient(self, params, indices):
        self.calls += 1
        if self.calls == self.fails and on_last_rank():
            raise ArithmeticError("this gradient went wrong later")
        return super().gradient(params, indices)


class Pools(Quadratic):
    """Each gradient forks: a pool of processes computes it. One that raises, or exits, does so alone."""

    def gradient(self, params, indices):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            squares = sum(pool.map(abs, range(4)))
        if on_last_rank():
            child = os.fork()
            if not child:
                raise ArithmeticError("in a child")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert squares == 6
        return super().gradient(params, indices)


class ExitsAtOnce(Quadratic):
    """The last rank ends its process without a word to MPI: in its n-th gradient, or while it loads (n = 0)."""

    def __init__(self, xp=np, n=5, code=3):
        super().__init__(xp)
        self.left, self.code = n, code
        self.count_down()

    def count_down(self):
        self.left -= 1
        if self.left < 0 and on_last_rank():
            os._exit(self.code)

    def gradient(self, params, indices):
        self.count_down()
        return super().gradient(params, indices)


class SlowLastEvaluation(Quadratic):
    """The last evaluation, of parameters that have moved, takes long."""

    first = True

    def evaluate(self, params):
        if not self.first:
            Path("last").touch()
            time.sleep(5)
        self.first = False
        return super().evaluate(params)


class Watched(Quadratic):
    """A large model; each rank appends its pages of memory, CPU and wall seconds to a file, several times a second."""

    def __init__(self, xp=np, directory=".", parameters=4_000_000, **options):
        super().__init__(xp, unused=parameters, **options)
        from mpi4py import MPI

        self.file = Path(directory, f"rank-{MPI.COMM_WORLD.rank}")
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            pages, cpu = int(Path("/proc/self/statm").read_text().split()[1]), os.times()
            with self.file.open("a") as file:
                print(pages, cpu.user + cpu.system, time.monotonic(), file=file)
            time.sleep(0.2)


class Counts:
    """Element i of the center counts how often sample i was committed: with rule downpour, and sgd of rate 1."""

    samples = 240

    def __init__(self, xp=np, slow=0.0):
        self.xp, self.slow = xp, slow

    def init(self, rng):
        return {"count": self.xp.zeros(self.samples, "float64")}

    def gradient(self, params, indices):
        time.sleep(self.slow)
        g = self.xp.zeros(self.samples, "float64")
        g[indices] = -1
        return 0.0, {"count": g}

    def evaluate(self, params):
        return {"least": float(params["count"].min()), "most": float(params["count"].max())}


class Struck(Counts):
    """As Counts; tells by files when it is called, and raises where a file asks this rank to: see `struck.py`."""

    def __init__(self, xp=np, directory=".", **options):
        super().__init__(xp, **options)
        from mpi4py import MPI

        self.directory, self.rank = Path(directory), MPI.COMM_WORLD.rank

    def reached(self, moment):
        (self.directory / moment).touch()
        if (asked := self.directory / f"raise-{self.rank}").exists():
            asked.unlink()
            raise ArithmeticError("struck")

    def gradient(self, params, indices):
        self.reached("training")
        return super().gradient(params, indices)

    def evaluate(self, params):
        self.reached("evaluation")
        time.sleep(0.05)
        return super().evaluate(params)


class Learns(Counts):
    """As Counts, and a linear model that learns; appends a byte to a file at each step."""

    def __init__(self, xp=np, directory=".", slow=0.0):
        super().__init__(xp, slow)
        rng = np.random.default_rng(0)
        self.x, truth = rng.normal(size=(self.samples, 20)), rng.normal(size=20)
        self.y = np.sign(self.x @ truth)
        self.file = Path(directory, "steps")

    def init(self, rng):
        return {**super().init(rng), "w": self.xp.zeros(20)}

    def gradient(self, params, indices):
        loss, g = super().gradient(params, indices)
        with self.file.open("ab") as file:
            file.write(b".")
        x, y = self.x[indices], self.y[indices]
        return loss, {**g, "w": -0.01 * ((y - x @ params["w"])[:, None] * x).mean(axis=0)}

    def evaluate(self, params):
        return {**super().evaluate(params), "accuracy": float((np.sign(self.x @ params["w"]) == self.y).mean())}
