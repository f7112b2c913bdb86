"""A small network for the temperature at a place and time: (x, y, t) → T."""

import numpy as np


class Heat:
    """tanh layers of `width`, by hand; x: (m, 3), y: (m,)."""

    def __init__(self, width=32):
        self.sizes = [3, width, width, 1]

    def init(self, rng):
        params = {}
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:])):
            params[f"w{i}"] = rng.normal(size=(a, b)) * (3, 1, 0)[i] / a**0.5
            params[f"b{i}"] = rng.normal(size=b) * (i == 0)
        return params

    def layers(self, params, x):
        h1 = np.tanh((2 * x - 1) @ params["w0"] + params["b0"])
        h2 = np.tanh(h1 @ params["w1"] + params["b1"])
        return h1, h2, (h2 @ params["w2"] + params["b2"])[:, 0]

    def gradient(self, params, x, y):
        h1, h2, predicted = self.layers(params, x)
        error = (predicted - y)[:, None]
        d3 = error / len(x)
        d2 = (d3 @ params["w2"].T) * (1 - h2**2)
        d1 = (d2 @ params["w1"].T) * (1 - h1**2)
        gradients = {"w0": (2 * x - 1).T @ d1, "w1": h1.T @ d2, "w2": h2.T @ d3}
        return (error**2).mean() / 2, gradients | {f"b{i}": d.sum(0) for i, d in enumerate((d1, d2, d3))}

    def predict(self, params, x):
        return self.layers(params, x)[2]
