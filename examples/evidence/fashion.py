"""Fashion-MNIST and a network of two convolutions with fewer than 100,000 parameters.

python -m agnmpi simulate examples/evidence/fashion.py:FashionCNN --workers 8 --batch 64 --schedule cosine
mpiexec -n 4 python -m agnmpi train examples/evidence/fashion.py:FashionCNN --batch 64 --schedule cosine
mpiexec -n 9 python examples/evidence/fashion.py --epochs 2     (agnmpi.torch, in a loop of its own)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "evidence"))

from mnist_mlp import read_set
from torch_problem import TorchProblem


def network(channels, hidden):
    """Two convolutions, each with a pooling; 28 × 28 pixels become 7 × 7."""
    first, second = channels
    head = [nn.Linear(49 * second, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), *head, nn.Linear(hidden or 49 * second, 10),
    )  # fmt: skip


def images(x):
    """x (m, 28, 28, 1) as PyTorch wants it, in the order in which a CPU convolves and pools faster: channels last."""
    return torch.from_numpy(x.transpose(0, 3, 1, 2))


class FashionCNN(TorchProblem):
    """`path`: directory of the IDX files; `samples`: of the training images, 0: all."""

    epochs = 10

    def __init__(
        self, xp=np, path="/usr/share/datasets/fashion-mnist", samples=0, channels=(24, 48), hidden=32, flip=True
    ):
        self.channels, self.hidden, self.flip = channels, hidden, flip
        (x, y), (x_test, y_test) = read_set(path, "train"), read_set(path, "t10k")
        mean, deviation = x.mean(), x.std()
        self.x, self.x_test = (((a - mean) / deviation).reshape(-1, 28, 28, 1) for a in (x[: samples or None], x_test))
        self.y, self.y_test = y, y_test
        self.samples = len(self.x)

    def network(self):
        return network(self.channels, self.hidden)

    def loss(self, model, indices):
        x = self.x[indices]
        if self.flip:
            flipped = np.random.default_rng(indices).random(len(x)) < 0.5
            x[flipped] = x[flipped, :, ::-1]
        return F.cross_entropy(model(images(x)), torch.from_numpy(self.y[indices]))

    def measure(self, model):
        outputs = torch.cat([model(x) for x in images(self.x_test).split(500)])
        y = torch.from_numpy(self.y_test)
        right = (outputs.argmax(1) == y).double().mean()
        return {"accuracy": right.item(), "test_loss": F.cross_entropy(outputs, y).item()}


def main() -> None:
    """Train it over MPI as `train` would by default: rate 0.001 · min(n, 8) after a warmup, and the outer rate 1."""
    from math import cos, pi

    from mpi4py import MPI
    from torch.utils.data import DataLoader

    import agnmpi.torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="directory of the IDX files")
    parser.add_argument("--epochs", type=float, default=1.0, help="over all workers together")
    args = parser.parse_args()
    problem, comm, batch = FashionCNN(path=args.data), MPI.COMM_WORLD, 64
    workers, steps = max(comm.size - 1, 1), int(args.epochs * problem.samples / batch)
    torch.manual_seed(0)
    model = problem.network()
    optimizer = torch.optim.Adam(model.parameters(), 0.001 * min(workers, 8))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (32 * workers)) * (1 + cos(pi * min(step / steps, 1))) / 2
    )
    run = agnmpi.torch.Run(model, optimizer, comm, period=10, scheduler=scheduler, outer_rate=1.0)
    samples = range(problem.samples)
    for indices in run.batches(DataLoader(samples, batch_sampler=run.sampler(samples, batch, args.epochs))):
        optimizer.zero_grad()
        problem.loss(model, indices.numpy()).backward()
        optimizer.step()
        scheduler.step()
    run.close()
    if comm.rank == 0:
        model.eval()
        with torch.inference_mode():
            print(problem.measure(model))


if __name__ == "__main__":
    main()
