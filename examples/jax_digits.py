"""JAX and optax: an MLP on scikit-learn's digits.

mpiexec -n 4 python examples/jax_digits.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mpi4py import MPI
from sklearn.datasets import load_digits

import agnmpi.jax


def loss_of(params, x, y):
    hidden = jax.nn.relu(x @ params["w"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["v"], y).mean(), hidden @ params["v"]


def batches(x, y, rng):
    while True:
        some = rng.integers(0, len(x), 64)
        yield x[some], y[some]


def main():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("f4") / 16, y[order]
    rng = np.random.default_rng(MPI.COMM_WORLD.rank)
    params = {"w": rng.normal(0, 0.1, (64, 64)), "b": np.zeros(64), "v": rng.normal(0, 0.1, (64, 10))}
    params = jax.tree.map(jnp.float32, params)
    optimizer = optax.adam(0.005)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        gradients, _ = jax.grad(loss_of, has_aux=True)(params, x, y)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    run = agnmpi.jax.Run(params, opt_state, MPI.COMM_WORLD, period=5, outer_rate=1.0)
    for x_batch, y_batch in run.batches(batches(x[360:], y[360:], rng), steps=600):
        run.update(*step(run.params, run.opt_state, x_batch, y_batch))
    run.close()
    right = (loss_of(run.params, x[:360], y[:360])[1].argmax(1) == y[:360]).mean()
    print(f"rank {MPI.COMM_WORLD.rank}: {right:.4f} of the test set are right")


if __name__ == "__main__":
    main()
