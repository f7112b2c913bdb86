"""An autoencoder: the state of one element of a mesh, x (m, d), to a code of a few numbers, and back."""

import numpy as np


class Autoencoder:
    """d → width → code → width → d with tanh between, gradients by hand; what it is to predict, y, is x."""

    def __init__(self, inputs, code=8, width=64):
        self.sizes = [inputs, width, code, width, inputs]

    def init(self, rng):
        params = {}
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:])):
            params[f"w{i}"] = (rng.normal(size=(a, b)) / a**0.5).astype(np.float32)
            params[f"b{i}"] = np.zeros(b, np.float32)
        return params

    def layers(self, params, x):
        """x, and what each layer makes of it; the code and the last are linear."""
        out = [x.astype(np.float32)]
        for i in range(4):
            z = out[-1] @ params[f"w{i}"] + params[f"b{i}"]
            out.append(np.tanh(z) if i in (0, 2) else z)
        return out

    def gradient(self, params, x, y):
        out = self.layers(params, x)
        error = out[-1] - y
        gradients, d = {}, 2 * error / error.size
        for i in (3, 2, 1, 0):
            if i in (0, 2):
                d = d * (1 - out[i + 1] ** 2)
            gradients |= {f"w{i}": out[i].T @ d, f"b{i}": d.sum(0)}
            d = d @ params[f"w{i}"].T
        return float((error**2).mean()), gradients

    def encode(self, params, x):
        return self.layers(params, x)[2]

    def predict(self, params, x):
        return self.layers(params, x)[-1]
