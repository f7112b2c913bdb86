"""MNIST and the paper's MLP 784-1000-2000-1000-10 (arXiv:1710.02368), from the four IDX files, gzipped or not.

mpiexec -n 5 python -m agnmpi train examples/mnist_mlp.py:Mnist --set options.path=DIRECTORY --batch 128 --epochs 2
mpiexec -n 4 python -m agnmpi train examples/mnist_mlp.py:FashionMnist --set options.widths=[64]
"""

import gzip
import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from mlp import MLP


def read_idx(directory, name):
    """Read an IDX file of unsigned bytes: two zero bytes, type 8, number of dimensions, each as uint32, data."""
    paths = [Path(directory) / name, Path(directory) / f"{name}.gz"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{paths[0]} (or .gz) does not exist: set options.path to MNIST's directory")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", content[3], 4).astype(int)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if data.size != shape.prod():
        raise ValueError(f"{path} holds {data.size} bytes, expected {shape.prod()}")
    return data.reshape(shape)


@cache
def read_set(directory, part):
    """Read the images (n, 784), in [0, 1], and the labels (n,) of a part: "train" or "t10k"."""
    images = read_idx(directory, f"{part}-images-idx3-ubyte")
    labels = read_idx(directory, f"{part}-labels-idx1-ubyte")
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int64)


class Mnist(MLP):
    """`path`: directory of the IDX files; `widths`: of the hidden layers; `samples`: of the training images, 0: all."""

    epochs = 10  # where the command line does not say

    def __init__(self, xp=np, path="mnist", widths=(1000, 2000, 1000), samples=0):
        x, y = read_set(path, "train")
        super().__init__(xp, (x[: samples or None], y[: samples or None]), read_set(path, "t10k"), list(widths))


class FashionMnist(Mnist):
    """The same of clothes; `path`: where Debian's package dataset-fashion-mnist has it."""

    def __init__(self, xp=np, path="/usr/share/datasets/fashion-mnist", widths=(1000, 2000, 1000), samples=0):
        super().__init__(xp, path, widths, samples)
