"""A PyTorch network with BatchNorm on MNIST, or without a directory of it on scikit-learn's digits.

mpiexec -n 4 python examples/torch_mnist.py [DIRECTORY]
"""

import sys

import numpy as np
import torch
from mnist_mlp import read_idx
from mpi4py import MPI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import agnmpi.torch


def images(directory=None):
    """Training and test set."""
    if directory is None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        sets = [(x[part].reshape(-1, 8, 8) / 16, y[part]) for part in (order[360:], order[:360])]
    else:
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        x, y, x_test, y_test = (read_idx(directory, name) for name in names)
        sets = [(x / 255, y), (x_test / 255, y_test)]
    return [TensorDataset(torch.tensor(x[:, None]).float(), torch.tensor(y).long()) for x, y in sets]


def network(size):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 10),
    )  # fmt: skip


def main():
    train, test = images(*sys.argv[1:])
    torch.manual_seed(0)
    model = network(train[0][0].shape[-1])
    loader, steps = DataLoader(train, 64, shuffle=True), 600
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = agnmpi.torch.Run(model, optimizer, MPI.COMM_WORLD, period=5, scheduler=scheduler, outer_rate=1.0)
    for x, y in run.batches(loader, steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    run.close()
    model.eval()
    x, y = test.tensors
    print(f"rank {MPI.COMM_WORLD.rank}: {(model(x).argmax(1) == y).float().mean():.4f} of the test set are right")


if __name__ == "__main__":
    main()
