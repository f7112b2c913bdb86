"""MNIST over slow links: agnmpi against plain PyTorch, on pseudo-hosts of this machine.

python tests/support/duel.py MNIST [--rate 1gbit] [--rounds 3] [--steps 300] [--only SIDE …]

MNIST: the directory of its IDX files. Two hosts train, each on one core, the MLP of arXiv:1710.02368 (4.8 M parameters)
with Adam on batches of 128; agnmpi's center is on a third host, or in shards beside the two. Sides of a round take
turns, each in a launch of its own:

    alone      two processes that exchange with nobody: what the machine can do
    local_sgd  PyTorch, gloo: the mean of the parameters by all_reduce each λ = 10 steps
    ddp        PyTorch's DistributedDataParallel, gloo
    agnmpi …   AGNOptimizer(None, …), overlap, outer rate 0.7, λ = 10 or the number that is named, the same model and
               step; with the options that are named
    numpy …    the same model and batches in NumPy (examples/mnist_mlp.py), with agnmpi's Adam: alone, or as agnmpi

The model's parameters are views of one vector on all sides. The steps hold a run's beginning and end, too, where every
rank gets the float32 center: the more steps, the less these count. Each round has a seed, of the parameters and of the
order of samples. Prints samples/s (medians over the rounds), the accuracy on the test set after the same number of
samples (means), and the CPU time of all ranks over the steps. Needs root, PyTorch, and netlab.sh (AGNMPI_NETLAB, else
../shared/tools/netlab.sh).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from launcher import ROOT, mpi_kind, mpiexec_path

NETLAB = Path(os.environ.get("AGNMPI_NETLAB") or ROOT.parent / "shared/tools/netlab.sh")
BATCH, PERIOD, WARM_UP = 128, 10, 20  # steps of each worker that are not timed: compilers, connections
# Side -> hosts of its ranks, and options of the transport, and λ; None: two that do not exchange by agnmpi.
SIDES = {
    "alone": ("h0,h1", None),
    "local_sgd": ("h0,h1", None),
    "ddp": ("h0,h1", None),
    "agnmpi": ("h2,h0,h1", {}),
    "agnmpi int4": ("h2,h0,h1", {"encoding": "int4", "pull_encoding": "int4"}),
    "agnmpi int8": ("h2,h0,h1", {"encoding": "int8", "pull_encoding": "int8"}),
    "agnmpi int4 8": ("h2,h0,h1", {"period": 8, "encoding": "int4", "pull_encoding": "int4"}),
    "agnmpi int8 5": ("h2,h0,h1", {"period": 5, "encoding": "int8", "pull_encoding": "int8"}),
    "agnmpi int4 5": ("h2,h0,h1", {"period": 5, "encoding": "int4", "pull_encoding": "int4"}),
    "numpy alone": ("h0,h1", None),
    "numpy int4": ("h2,h0,h1", {"encoding": "int4", "pull_encoding": "int4"}),
    "agnmpi shards": ("h0,h1,h0,h1", {"centers": "hosts"}),
    "agnmpi shards int8": ("h0,h1,h0,h1", {"centers": "hosts", "encoding": "int8", "pull_encoding": "int8"}),
}


def model_of(torch, seed):
    """The MLP, the same on every rank."""
    torch.manual_seed(seed)
    widths = [784, 1000, 2000, 1000, 10]
    layers = []
    for i, o in pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    parameters = list(model.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters).detach(), parameters)
    return model


class Timer:
    """Seconds, and those of CPU time, of this rank; the ranks begin together."""

    def __init__(self, comm):
        comm.Barrier()
        self.began = time.perf_counter(), time.process_time()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        now = time.perf_counter(), time.process_time()
        self.seconds, self.busy = (there - here for here, there in zip(self.began, now))


class Task:
    """Model, optimizer and data of a rank."""

    def __init__(self, path, seed):
        import torch

        sys.path.insert(0, str(ROOT / "examples"))
        from mnist_mlp import read_idx

        torch.set_num_threads(1)
        self.torch, self.sets = torch, {}
        for part in ("train", "t10k"):
            images, labels = (read_idx(path, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
            x = torch.from_numpy(images.reshape(len(images), -1).copy()).float() / 255
            self.sets[part] = x, torch.from_numpy(labels.copy()).long()
        self.order = torch.randperm(60000, generator=torch.Generator().manual_seed(seed + 1))
        self.model = model_of(torch, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.params = {name: p.detach().numpy() for name, p in self.model.named_parameters()}

    def step(self, number, model=None):
        """Train on batch `number` of the whole run."""
        rows = self.order[(number * BATCH + self.torch.arange(BATCH)) % 60000]
        x, y = self.sets["train"]
        loss = self.torch.nn.functional.cross_entropy((model or self.model)(x[rows]), y[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def step_of(self, opt, number):
        """Take it with an AGNOptimizer."""
        opt.step(self.step(number))

    def accuracy(self):
        x, y = self.sets["t10k"]
        with self.torch.no_grad():
            return float((self.model(x).argmax(1) == y).float().mean())


class NumpyTask:
    """The same in NumPy: agnmpi's optimizer takes the steps."""

    def __init__(self, path, seed):
        import numpy as np

        sys.path.insert(0, str(ROOT / "examples"))
        from mnist_mlp import Mnist

        self.problem = Mnist(path=path)
        self.params = self.problem.init(np.random.default_rng(seed))
        self.order = np.random.default_rng(seed + 1).permutation(60000)

    def step_of(self, opt, number):
        """Train on batch `number` with an AGNOptimizer."""
        rows = self.order.take(range(number * BATCH, (number + 1) * BATCH), mode="wrap")
        opt.minimize(lambda params: self.problem.gradient(params, rows))

    def accuracy(self):
        return self.problem.evaluate(self.params)["accuracy"]


def train_pytorch(task, side, comm, steps):
    """Train `steps` steps on each of two ranks; returns the seconds."""
    import torch.distributed as dist

    model = task.model
    if side != "alone":
        dist.init_process_group("gloo", "tcp://h0:29500", rank=comm.rank, world_size=comm.size)
    if side == "ddp":
        model = task.torch.nn.parallel.DistributedDataParallel(model)
    parameters = list(task.model.parameters())

    def train(steps):
        for i in steps:
            task.step(i * comm.size + comm.rank, model)
            if side == "local_sgd" and (i + 1) % PERIOD == 0:
                flat = task.torch.nn.utils.parameters_to_vector(parameters)
                dist.all_reduce(flat.detach_())
                task.torch.nn.utils.vector_to_parameters(flat / comm.size, parameters)

    train(range(WARM_UP))
    with Timer(comm) as timer:
        train(range(WARM_UP, WARM_UP + steps))
    if side != "alone":
        dist.destroy_process_group()
    return timer


def train_agnmpi(task, options, comm, steps):
    """Train on two workers, 2 × `steps` timed steps; without `options` each alone."""
    from mpi4py import MPI

    from agnmpi import AGNOptimizer, adam, rules, transports

    numpy, alone = isinstance(task, NumpyTask), options is None
    options = {"period": PERIOD} | (options or {})
    rule = rules.weighted(rules.agn(), rules.outer_rate(1.0 if alone else 0.7))
    opt = AGNOptimizer(
        adam(1e-3) if numpy else None, task.params, MPI.COMM_SELF if alone else comm, options.pop("period"), rule=rule,
        transport="local" if alone else transports.p2p(**options), overlap=not alone, copy=numpy,
    )  # fmt: skip
    workers, first, apart = (1, comm.rank, comm.size) if alone else (2, 0, 1)

    def train(begin, count):
        for i in opt.steps(workers * count):
            task.step_of(opt, (workers * begin + i) * apart + first)

    train(0, WARM_UP)
    with Timer(comm) as timer:
        train(WARM_UP, steps)
    opt.close()
    task.params = opt.params
    return timer


def rank(side, path, steps, seed, out):
    """What one rank of a launch does."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    numpy = side.startswith("numpy")
    task = NumpyTask(path, seed) if numpy else Task(path, seed)
    if SIDES[side][1] is None and not numpy:
        timer = train_pytorch(task, side, comm, steps)
    else:
        timer = train_agnmpi(task, SIDES[side][1], comm, steps)
    slowest, busy = comm.reduce(timer.seconds, MPI.MAX), comm.reduce(timer.busy)
    if comm.rank == 0:
        rate = 2 * steps * BATCH / slowest
        Path(out).write_text(json.dumps({"rate": rate, "accuracy": task.accuracy(), "busy": busy / (2 * steps)}))


def measure(side, mnist, steps, seed, where, environment):
    """One launch of a side: samples/s and accuracy."""
    out = Path(where) / "out.json"
    out.unlink(missing_ok=True)
    kind = "ompi" if mpi_kind() == "openmpi" else "mpich"
    command = [str(NETLAB), "run", "-H", SIDES[side][0], kind, sys.executable, __file__, "rank", side]
    done = subprocess.run(
        [*command, str(mnist), str(steps), str(seed), str(out)], env=environment, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    subprocess.run([NETLAB, "clean"], env=environment, check=False)
    if not out.is_file():
        raise RuntimeError(f"{side}: exit {done.returncode}\n{done.stdout[-3000:]}")
    return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each worker")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    args = parser.parse_args()
    venv = Path(mpiexec_path()).parent.parent
    found = {side: [] for side in args.only}
    with tempfile.TemporaryDirectory() as where:
        environment = os.environ | {
            "NC_STATE": f"{where}/state", "NC_BIN": where, "NC_OMPI": str(venv), "NC_MPICH": str(venv),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        subprocess.run([NETLAB, "up", "3", "--rate", args.rate], env=environment, check=True)
        try:
            for seed in range(args.rounds):
                for side, results in found.items():
                    results.append(measure(side, args.mnist.resolve(), args.steps, seed, where, environment))
                    print(f"{side}: {results[-1]}", file=sys.stderr, flush=True)
        finally:
            subprocess.run([NETLAB, "down"], env=environment, check=False)
    print(f"{mpi_kind()}, {args.rate}, {args.rounds} rounds of {args.steps} steps on each of 2 workers")
    for side, results in found.items():
        rates, accuracies, busy = ([r[key] for r in results] for key in ("rate", "accuracy", "busy"))
        print(
            f"{side:>20}  {statistics.median(rates):6.0f} samples/s ({min(rates):.0f}-{max(rates):.0f})"
            f"   accuracy {statistics.mean(accuracies):.4f} ({min(accuracies):.4f}-{max(accuracies):.4f})"
            f"   CPU {1e3 * statistics.median(busy):.1f} ms a step"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        main()
