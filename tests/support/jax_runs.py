"""What JAX runs must do on real ranks: start it under mpiexec -n 3 with names of checks below."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mpi4py import MPI

import agnmpi.jax
from agnmpi import AGNOptimizer, optimistic

COMM = MPI.COMM_WORLD
TARGET = {"w": np.arange(6.0).reshape(2, 3), "b": np.array([-1.0, 1.0])}


def made(dtype=jnp.float32, rate=0.05):
    """Parameters, an optimizer's state, a jitted step that donates both, and whose third argument may be NaN."""
    params = jax.tree.map(lambda x: jnp.full(x.shape, COMM.rank + 1, dtype), TARGET)
    optimizer = optax.adam(rate)

    def loss(params, scale):
        errors = jax.tree.map(lambda p, t: (scale * (p - t) ** 2).sum(), params, jax.tree.map(jnp.asarray, TARGET))
        return sum(jax.tree.leaves(errors))

    def step(params, state, scale):
        updates, state = optimizer.update(jax.grad(loss)(params, scale), state)
        return optax.apply_updates(params, updates), state

    return params, optimizer.init(params), jax.jit(step, donate_argnums=(0, 1)), step


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)])


def equal_everywhere(tree):
    return len({x.tobytes() for x in COMM.allgather(flat(tree))}) == 1


def same_numbers(**options):
    """As the loop written by hand with AGNOptimizer, with one worker."""
    part = COMM.Split(0 if COMM.rank < 2 else MPI.UNDEFINED, COMM.rank)
    if part == MPI.COMM_NULL:
        return
    params, state, step, _ = made()
    with agnmpi.jax.Run(params, state, part, period=4, **options) as run:
        for scale in run.batches([1.0, 0.5], steps=22):
            run.update(*step(run.params, run.opt_state, scale))
    params, state, step, _ = made()
    own = {name: np.array(leaf) for name, leaf in params.items()}
    with AGNOptimizer(None, own, part, 4, **options) as opt:
        for number in opt.steps(22):
            params = {name: jnp.array(x.copy()) for name, x in own.items()}
            params, state = step(params, state, [1.0, 0.5][number % 2])
            for name, leaf in params.items():
                own[name][...] = leaf
            opt.step()
    for name, x in own.items():
        np.testing.assert_allclose(run.params[name], x, rtol=1e-6)
    assert len({x.tobytes() for x in part.allgather(flat(run.params))}) == 1


def same_numbers_with_a_center_optimizer():
    same_numbers(center_optimizer=optimistic(1.0, span=2), outer_rate=1.0)


def learns():
    """All ranks end with the center, which is what was to be learned; in few digits, and while exchanges run, too."""
    for dtype, overlap in ((jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)):
        params, state, step, _ = made(dtype)
        with agnmpi.jax.Run(params, state, COMM, period=4, outer_rate=1.0, overlap=overlap) as run:
            for scale in run.batches([1.0], steps=800):
                run.update(*step(run.params, run.opt_state, scale))
            with run.center() as center:
                assert jax.tree.structure(center) == jax.tree.structure(params)
        assert equal_everywhere(run.params), (dtype, overlap)
        off = np.abs(flat(run.params) - flat(TARGET)).max()
        assert off < (0.5 if dtype == jnp.bfloat16 else 0.1), (dtype, overlap, off)


def bad_gradient():
    """One NaN costs at most two periods; Adam's moments begin anew."""
    params, state, step, _ = made()
    bad, turn = [], 0
    with agnmpi.jax.Run(params, state, COMM, period=4, outer_rate=1.0) as run:
        for scale in run.batches([1.0] * 400):  # each worker takes them all, however fast the other is
            scale = np.nan if (COMM.rank, turn) == (2, 10) else scale
            run.update(*step(run.params, run.opt_state, scale))
            turn += 1
            bad += [turn] * (not np.isfinite(flat(run.params)).all())
    assert len(bad) <= 8, bad
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.opt_state))
    assert np.abs(flat(run.params) - flat(TARGET)).max() < 0.1
    assert run.is_center or turn == 400, "it goes on"


def main():
    for name in sys.argv[1:]:
        globals()[name]()
        COMM.Barrier()
        if COMM.rank == 0:
            print(f"{name} holds", flush=True)


if __name__ == "__main__":
    main()
