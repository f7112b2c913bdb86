"""What a run adds to a step outside of exchanges: python tests/support/framework_overhead.py [torch] [jax].

A turn of `run.batches` and the count of its step, without gradients, in turn with the same loop without a run; the
median of 9 rounds of 200 turns each.
"""

import sys
import time
from statistics import median

from mpi4py import MPI

TURNS, ROUNDS, MODELS = 200, 9, {"4.8 M numbers": [(2190, 2190)], "300 tensors": [(64, 64)] * 300}


def compare(plain, with_run):
    """Milliseconds that a turn of `with_run` takes longer."""
    longer = []
    for _ in range(ROUNDS):
        times = []
        for turns in (plain, with_run):
            start = time.perf_counter()
            for _ in range(TURNS):
                next(turns)
            times.append((time.perf_counter() - start) / TURNS)
        longer.append(1000 * (times[1] - times[0]))
    return median(longer)


def with_torch(shapes, device="cpu"):
    import torch

    import agnmpi.torch

    def turns(optimizer, batches):
        for _ in batches:
            optimizer.step()  # no gradients: nothing moves, the hook counts
            yield

    made = []
    for _ in range(2):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes])
        made.append((model, torch.optim.SGD(model.parameters(), 0.1)))
    model, optimizer = made[1]
    run = agnmpi.torch.Run(model, optimizer, MPI.COMM_SELF, period=10**6, transport="local")
    with run:
        return compare(turns(made[0][1], iter(int, 1)), turns(optimizer, run.batches([0], steps=10**7)))


def with_jax(shapes):
    import jax.numpy as jnp

    import agnmpi.jax

    params = [jnp.zeros(shape) for shape in shapes]
    run = agnmpi.jax.Run(params, None, MPI.COMM_SELF, period=10**6, transport="local")

    def turns():
        for _ in run.batches([0], steps=10**7):
            run.update(run.params)
            yield

    with run:
        return compare(iter(int, 1), turns())


def main():
    for framework in sys.argv[1:] or ["torch", "jax"]:
        for name, shapes in MODELS.items():
            longer = {"torch": with_torch, "jax": with_jax}[framework](shapes)
            print(f"{framework}, {name}: {longer:.4f} ms a step", flush=True)


if __name__ == "__main__":
    main()
