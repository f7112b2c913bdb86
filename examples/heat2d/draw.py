"""Prediction and truth: python examples/heat2d/draw.py FILE PICTURE.png, of a file that heat.c or heat.f90 writes."""

import sys

import numpy as np


def draw(path, truth, predicted):
    """Truth, prediction and their difference on the whole plate, (n, n) each."""
    import matplotlib  # pip install ".[paper]"

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, title, values in zip(axes, ("solver", "surrogate", "difference"), (truth, predicted, predicted - truth)):
        figure.colorbar(axis.imshow(values, origin="lower", extent=(0, 1, 0, 1)), ax=axis)
        axis.set_title(title)
    figure.savefig(path)


def read(path):
    """Truth and prediction, (n, n) each, of a file of float64."""
    numbers = np.fromfile(path)
    n = round((numbers.size / 2) ** 0.5)
    return numbers.reshape(2, n, n)


if __name__ == "__main__":
    draw(sys.argv[2], *read(sys.argv[1]))
