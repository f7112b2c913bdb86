"""A center optimizer of your own: delayed Nesterov, whose momentum moves only once in a round of commits.

mpiexec -n 4 python examples/delayed_nesterov.py
"""

from typing import NamedTuple

import numpy as np

from agnmpi import Optimizer


class DelayedNesterovState(NamedTuple):
    step: int
    momentum: np.ndarray
    buffer: np.ndarray


def delayed_nesterov(rate=1.0, every=1, beta=0.5):
    """B ← B + g, x ← x − ηg; at every N-th g also m ← βm + B, x ← x − ηβm, B ← 0.

    Args:
        rate: η, a positive number (default 1.0). With β = 0 a rate of 1 adds the commits as they are: that is AGN.
        every: N, commits between two moves of the momentum, usually the number of workers (default 1).
        beta: β, what is kept of the momentum, in [0, 1) (default 0.5).

    Returns:
        An Optimizer with the slots `momentum` and `buffer`.

    Raises:
        ValueError: Unless η > 0, N ≥ 1 and 0 ≤ β < 1.

    Source: Liu et al. 2024, arXiv:2401.09135, algorithm 3 with c = 0; its ε is ηN here, and its m is m/N.
    """
    if not (rate > 0 and every >= 1 and 0 <= beta < 1):
        raise ValueError(f"rate > 0, every >= 1 and 0 <= beta < 1 are needed, not {rate!r}, {every!r}, {beta!r}")

    def init(x):
        return DelayedNesterovState(0, x * 0, x * 0)

    def update(g, state, x, *, step=None, scale=1.0, ranges=None, on_block=None):  # noqa: ARG001
        _, momentum, buffer = state
        count = state.step + 1
        for start, stop in [(0, x.size)] if ranges is None else ranges:
            part = slice(start, stop)
            d = scale * g[part]
            buffer[part] += d
            x[part] -= rate * d
            if count % every == 0:
                momentum[part] *= beta
                momentum[part] += buffer[part]
                buffer[part] = 0
                x[part] -= rate * beta * momentum[part]
            if on_block:
                on_block(stop)
        return state._replace(step=count)

    return Optimizer("delayed_nesterov", init, update, f"rate {rate:g}, every {every}, beta {beta:g}")


def main():
    """y = 3x + 1 with noise: the workers see 4,000 points, the center ends near 3 and 1."""
    from mpi4py import MPI

    from agnmpi import AGNOptimizer, sgd

    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    y = 3 * x + 1 + 0.1 * rng.normal(size=4000)
    comm = MPI.COMM_WORLD
    center_optimizer = delayed_nesterov(every=comm.size - 1, beta=0.3)
    with AGNOptimizer(
        sgd(0.1), {"a": np.zeros(1), "b": np.zeros(1)}, comm, communication_period=5, center_optimizer=center_optimizer
    ) as opt:
        for step in opt.steps(1000):
            batch = np.arange(step * 32, (step + 1) * 32) % len(x)

            def loss(p, batch=batch):
                error = p["a"] * x[batch] + p["b"] - y[batch]
                return (error**2).mean() / 2, {
                    "a": (error * x[batch]).mean(keepdims=True),
                    "b": error.mean(keepdims=True),
                }

            opt.minimize(loss)
        if comm.rank == 0:
            print(f"y = {opt.center['a'][0]:.2f} x + {opt.center['b'][0]:.2f}")


if __name__ == "__main__":
    main()
