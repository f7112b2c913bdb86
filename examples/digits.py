"""scikit-learn's digits (1,797 images of 8 x 8) and an MLP.

mpiexec -n 4 python -m agnmpi train examples/digits.py:Digits
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from mlp import MLP


class Digits(MLP):
    """`hidden`: width of the hidden layer; `dtype`: float32 or float64."""

    epochs = 60  # of 45 steps; where the command line does not say

    def __init__(self, xp=np, hidden=64, dtype="float32"):
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = (data.data / 16).astype(dtype), data.target
        order = np.random.default_rng(0).permutation(len(x))  # the split is the same in every run
        test, train = order[:360], order[360:]
        super().__init__(xp, (x[train], y[train]), (x[test], y[test]), [hidden])
