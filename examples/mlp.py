"""A multilayer perceptron with ReLU and softmax, gradients written by hand; one code for NumPy and CuPy."""

import numpy as np


class MLP:
    """A problem (see agnmpi.Problem) from arrays: x (samples, features) in [0, 1], y (samples,) classes."""

    def __init__(self, xp, train, test, widths):
        self.xp = xp
        self.x, self.y = (xp.asarray(a) for a in train)
        self.x_test, self.y_test = (xp.asarray(a) for a in test)
        self.samples = len(self.x)
        self.widths = [self.x.shape[1], *widths, int(self.y.max()) + 1]
        self.layers = range(len(self.widths) - 1)

    def init(self, rng):
        params = {}
        for i in self.layers:
            shape = self.widths[i], self.widths[i + 1]
            scale = np.sqrt(2 / shape[0])  # He et al. 2015
            params[f"w{i}"] = self.xp.asarray(rng.normal(0, scale, shape), dtype=self.x.dtype)
            params[f"b{i}"] = self.xp.zeros(shape[1], self.x.dtype)
        return params

    def forward(self, params, x):
        """Return the input of each layer, and the logits."""
        inputs = [x]
        for i in self.layers:
            z = inputs[-1] @ params[f"w{i}"] + params[f"b{i}"]
            inputs.append(z if i == self.layers[-1] else self.xp.maximum(z, 0))
        return inputs

    def loss(self, logits, y):
        """Return the mean cross-entropy, and its derivative by the logits."""
        rows = self.xp.arange(len(y))
        p = logits - logits.max(axis=1, keepdims=True)
        self.xp.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        loss = -self.xp.log(p[rows, y] + 1e-12).mean()
        p[rows, y] -= 1
        return loss, p / p.dtype.type(len(y))

    def gradient(self, params, indices):
        indices = self.xp.asarray(indices)
        *inputs, logits = self.forward(params, self.x[indices])
        loss, d = self.loss(logits, self.y[indices])
        grads = {}
        for i in reversed(self.layers):
            grads[f"w{i}"], grads[f"b{i}"] = inputs[i].T @ d, d.sum(axis=0)
            if i:
                d = (d @ params[f"w{i}"].T) * (inputs[i] > 0)
        return float(loss), grads

    def evaluate(self, params):
        right, total = 0, 0.0
        for at in range(0, len(self.x_test), 1000):
            y = self.y_test[at : at + 1000]
            logits = self.forward(params, self.x_test[at : at + 1000])[-1]
            right += int((logits.argmax(axis=1) == y).sum())
            total += float(self.loss(logits, y)[0]) * len(y)
        return {"accuracy": right / len(self.x_test), "test_loss": total / len(self.x_test)}
