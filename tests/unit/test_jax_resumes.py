"""A JAX run of one process that is interrupted and started again: bit by bit what it is undisturbed."""

import os
import signal

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
from mpi4py import MPI  # noqa: E402

import agnmpi.jax  # noqa: E402
from agnmpi import Interrupted  # noqa: E402

jnp = jax.numpy


class Shuffled:
    """Batches of 32 numbers in another order at each pass, of NumPy's global generator."""

    def __iter__(self):
        order = np.random.permutation(32)  # noqa: NPY002 - as loaders of others do
        for i in range(0, 32, 8):
            yield jnp.asarray(order[i : i + 8], jnp.float32) / 32


def script(end=None, dtype=jnp.float32, key=jax.random.key, last=15, **options):
    """Two loops, of 15 and `last` steps; interrupted at turn `end`. Returns the losses, and the numbers at the end."""
    np.random.seed(2)  # noqa: NPY002 - as above
    params = {"w": jnp.full((3, 2), 0.5, dtype), "b": jnp.zeros(2, dtype)}
    optimizer = optax.chain(optax.add_noise(0.01, 0.5, key=jax.random.key(7)), optax.adamw(0.02))

    def loss(params, x, key):
        dropped = jax.random.bernoulli(key, 0.8, (x.size, 3))
        out = (x[:, None] * dropped) @ params["w"].astype(jnp.float32) + params["b"]
        return ((out - x[:, None] * jnp.array([1.0, -2.0])) ** 2).mean()

    @jax.jit
    def step(params, state, x, key):
        value, gradients = jax.value_and_grad(loss)(params, x, key)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    run = agnmpi.jax.Run(
        params, optimizer.init(params), MPI.COMM_SELF, period=3, transport="local", key=key(1), **options
    )
    losses = []
    try:
        for steps in (15, last):
            for x in run.batches(Shuffled(), steps=steps):
                run.key, own = jax.random.split(run.key)
                value, *moved = step(run.params, run.opt_state, x, own)
                losses.append(float(value))
                run.update(*moved)
                if len(losses) == end:
                    os.kill(os.getpid(), signal.SIGUSR1)
    except Interrupted:
        pass
    run.close()
    leaves = jax.tree.leaves((run.params, run.opt_state, run.key))
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return losses, [np.asarray(jax.random.key_data(x) if is_key else x).tobytes() for x, is_key in zip(leaves, keys)]


@pytest.mark.parametrize("end", [1, 21])
@pytest.mark.parametrize(
    ("dtype", "key"), [(jnp.float32, jax.random.key), (jnp.bfloat16, jax.random.PRNGKey)], ids=["float32", "bfloat16"]
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, end, dtype, key):
    whole, numbers = script(dtype=dtype, key=key)
    assert len(whole) == 30
    options = {"dtype": dtype, "key": key, "checkpoint": tmp_path, "resume": "auto"}
    first, _ = script(end, **options)
    second, found = script(**options)
    assert len(first) < 30
    assert first + second == whole
    assert found == numbers


def test_a_complete_run_that_is_asked_for_more_steps_goes_on(tmp_path):
    whole, numbers = script()
    first, _ = script(last=9, checkpoint=tmp_path, resume="auto")
    second, found = script(checkpoint=tmp_path, resume="auto")
    assert (len(first), len(second)) == (24, 6)
    assert first + second == whole
    assert found == numbers


def test_another_state_is_refused(tmp_path):
    script(21, checkpoint=tmp_path)
    run = agnmpi.jax.Run(
        {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, jnp.zeros(3), MPI.COMM_SELF, transport="local", resume=tmp_path
    )
    assert list(run.turns(15)) == []
    with pytest.raises(ValueError, match="of another opt_state or key: leaf"):
        next(run.turns(15))


def test_other_parameters_are_refused(tmp_path):
    script(21, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"of another model: .*\(3, 2\) there and \(2, 3\) here"):
        agnmpi.jax.Run(
            {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, jnp.zeros(3), MPI.COMM_SELF, transport="local", resume=tmp_path
        )


def test_numbers_that_were_loaded_are_what_they_are():
    """Between two loops: what rounding had added to the numbers before is not taken from much smaller ones."""
    given = {"w": jnp.full(64, 0.5, jnp.bfloat16)}
    run = agnmpi.jax.Run(given, None, MPI.COMM_SELF, period=3, transport="local", outer_rate=0.3)
    small = jnp.linspace(-1, 1, 64).astype(jnp.bfloat16) * 2.0**-13
    for _ in run.batches([jnp.ones(1)], steps=3):
        run.update({"w": run.params["w"] * 1.01})
    run.params = {"w": small}
    for _ in run.batches([jnp.ones(1)], steps=3):
        run.update(run.params)
    run.close()
    np.testing.assert_array_equal(np.asarray(run.params["w"]), np.asarray(small))
