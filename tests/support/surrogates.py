"""Surrogates for tests, and a coupled solver."""

import numpy as np


class Mean:
    """Fits the mean of y by a vector: the least squares optimum is the mean over all samples."""

    def __init__(self, size=1):
        self.size = size

    def init(self, rng):
        return {"w": np.zeros(self.size)}

    def gradient(self, params, x, y):
        error = params["w"] - y.mean()
        return float((error**2).mean()) / 2, {"w": error}

    def predict(self, params, x):
        return np.full(len(x), params["w"][0])


class Fails(Mean):
    """Its gradients are NaN."""

    def gradient(self, params, x, y):
        return 0.0, {"w": np.full(self.size, np.nan)}


class Places(Mean):
    """Predicts from x (m, 2) a number that says which of both is which."""

    def predict(self, params, x):
        return x[:, 0] + 10 * x[:, 1]


class Pairs(Mean):
    """Predicts y (m, 2) from x (m, 2)."""

    def predict(self, params, x):
        return x * [1, 10]


class Raises(Mean):
    def gradient(self, params, x, y):
        raise KeyError("a mistake of the user's")


class Ring:
    """A solver whose ranks need each other in each time step, by blocking calls: a mean with both neighbours."""

    def __init__(self, comm):
        self.comm, self.value = comm, np.array([float(comm.rank)])

    def step(self):
        rank, size = self.comm.rank, self.comm.size
        left, right = np.empty(1), np.empty(1)
        self.comm.Sendrecv(self.value, (rank + 1) % size, 7, left, (rank - 1) % size, 7)
        self.comm.Sendrecv(self.value, (rank - 1) % size, 8, right, (rank + 1) % size, 8)
        self.value = (left + self.value + right) / 3
