"""A directory of IDX files as MNIST's, with a few made-up images."""

import numpy as np


def made_up_mnist(folder, train, test):
    """Write `train` and `test` images of noise, with a bright line in the row of their class; returns `folder`."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, samples in (("train", train), ("t10k", test)):
        labels = np.arange(samples, dtype=np.uint8) % 10
        pixels = rng.integers(0, 40, (samples, 28, 28), np.uint8)
        pixels[np.arange(samples), labels] = 255
        for name, data in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">u4").tobytes()
            (folder / name).write_bytes(header + data.tobytes())
    return folder
