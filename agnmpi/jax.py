"""JAX: `agnmpi.jax.Run` trains a pytree of yours, by optax or by hand, in your loop; see examples/README.md."""

try:
    from .frameworks.jax import Run as Run
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ModuleNotFoundError("agnmpi.jax needs JAX: pip install 'agnmpi[jax]'", name="jax") from None
