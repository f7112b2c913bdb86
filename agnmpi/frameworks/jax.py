"""JAX: a pytree of parameters, trained over MPI in the loop that is there already."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from mpi4py import MPI

from ..arrays.backend import Array, empty
from ..cluster.placement import check_world
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..loops.agn_optimizer import AGNOptimizer
from ..loops.monitoring import Monitoring
from ..transport.agreement import raise_on_all, require_equal
from ..transport.registry import Transport
from .launcher import hide_launcher_from_children
from .run import Run as AnyRun

hide_launcher_from_children()
Tree: TypeAlias = Any


class Run(AnyRun):
    """Train `params` over the ranks of `comm`: your jitted step, its optimizer (optax) and its data stay as they are.

        for x, y in run.batches(data, steps=1000):
            run.update(*step(run.params, run.opt_state, x, y))

    Each worker takes λ such steps, commits (x − o)/λ, and takes the center. Rank 0 holds the center: its loop over
    `batches` serves, and yields nothing. The same script runs on every rank.

    Args:
        params: a pytree of floating arrays; rank 0's are those that all begin with.
        opt_state: a pytree, such as optax's state; it stays on its worker. Default: none.
        comm: any communicator; it is duplicated.
        period: λ, steps between exchanges; default 10.
        key: of `jax.random`, of which each worker gets one of its own. Default: none.
        rule, center_optimizer, outer_rate, transport, overlap, wait, dylu, checkpoint, resume, checkpoint_every,
            checkpoint_workers: as of `AGNOptimizer`. Checkpoints hold, of each worker, opt_state, key, and the place in
            the data.
        monitor: as of `AGNOptimizer`: what `agnmpi train` shows and writes. Its `evaluate` is given the center as such
            a tree.

    Attributes:
        params: to take the next step from. A new tree after an exchange; its arrays may be donated to a jitted step.
        opt_state: likewise; after a commit that was refused (NaN) it is what it was at the beginning.
        key: take yours from it: `run.key, key = jax.random.split(run.key)`.

    Raises:
        ValueError: for trees that differ between ranks, or hold no floating numbers.
    """

    _steps_by = "run.update()"

    def __init__(
        self,
        params: Tree,
        opt_state: Tree,
        comm: MPI.Intracomm,
        period: int = 10,
        *,
        rule: Rule | None = None,
        center_optimizer: Optimizer | None = None,
        outer_rate: float | None = None,
        transport: str | Transport = "auto",
        overlap: bool = False,
        wait: bool = True,
        dylu: bool = False,
        key: Any = None,
        checkpoint: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: float = 300.0,
        checkpoint_workers: str = "auto",
        monitor: Monitoring | str | Path | None = None,
    ) -> None:
        self.params, self.opt_state, self.key = params, opt_state, key
        self._first_state = _copied(opt_state)
        check_world(comm)
        ours = comm.Dup()
        try:
            vector = raise_on_all(ours, lambda: _vector(params))
            require_equal(ours, {name: f"{leaf.dtype}, {leaf.shape}" for name, leaf in _leaves(params)})
        finally:
            ours.Free()
        self._x, self._ravel, self._unravel, rounds = vector
        # What rounding has added to the numbers last unpacked, where leaves have fewer digits than x.
        self._error = np.zeros_like(self._x) if rounds else None
        opt = AGNOptimizer(
            None, self._x, comm, period, name="agnmpi.jax.Run", copy=False, rule=rule,
            center_optimizer=center_optimizer, outer_rate=outer_rate, transport=transport, overlap=overlap, wait=wait,
            dylu=dylu, on_commit=self._pack, on_pull=self._unpack,
            on_refused=self._refused, checkpoint=checkpoint, resume=resume, checkpoint_every=checkpoint_every,
            checkpoint_workers=checkpoint_workers, state=self._state, load_state=self._resumed_with,
            monitor=self._monitoring(monitor), tensors={name: str(leaf.shape) for name, leaf in _leaves(params)},
        )  # fmt: skip
        super().__init__(opt, period, checkpoint)
        if key is not None and opt.worker > 0:
            self.key = jax.random.fold_in(key, opt.worker)

    def update(self, params: Tree, opt_state: Tree = None) -> None:
        """Count the step that has led to `params` and `opt_state`, and exchange when λ are done."""
        self.params, self.opt_state = params, opt_state
        self._step()

    def _own_state(self) -> dict[str, Array]:
        return {name: _bytes(leaf) for name, leaf in _leaves((self.opt_state, self.key))}

    def _set_own_state(self, saved: Mapping[str, Array], within: bool) -> None:
        own = self.opt_state, self.key
        if differ := saved.keys() ^ {name for name, _ in _leaves(own)}:
            raise ValueError(f"the checkpoint is of another opt_state or key: {', '.join(sorted(differ))}")
        leaves = [_from_bytes(saved[name], name, leaf) for name, leaf in _leaves(own)]
        self.opt_state, self.key = jax.tree.unflatten(jax.tree.structure(own), leaves)

    def _pack(self, _opt: AGNOptimizer) -> None:
        own = np.asarray(self._ravel(self.params))
        if self._error is None:
            self._x[...] = own
            return
        np.subtract(own, self._error, out=self._x)
        # Numbers that were written anew, not moved by steps, are what they are.
        np.copyto(self._x, own, where=np.asarray(self._ravel(self._tree(self._x))) != own)

    def _unpack(self, _opt: AGNOptimizer) -> None:
        self.params = self._tree(self._x)
        if self._error is not None:
            np.subtract(self._ravel(self.params), self._x, out=self._error)

    def _refused(self, _opt: AGNOptimizer) -> None:
        self.opt_state = _copied(self._first_state)

    def _tree(self, x: Array) -> Tree:
        # A copy: a jitted function that is given a view may read it when x has changed.
        return self._unravel(jnp.asarray(x.copy()))

    @contextmanager
    def _holding(self, x: Array) -> Generator[Tree, None, None]:
        own, self.params = self.params, self._tree(x)
        try:
            yield self.params
        finally:
            self.params = own


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves of `tree` by name."""
    return [(f"leaf {jax.tree_util.keystr(path)}", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _copied(tree: Tree) -> Tree:
    """A copy of `tree`, which outlives arrays that are donated."""
    return jax.tree.map(jnp.copy, tree)


def _vector(tree: Tree) -> tuple[Array, Callable[[Tree], Array], Callable[[Array], Tree], bool]:
    """The numbers of `tree` as a vector (n,); jitted functions there and back; whether some leaves have fewer digits.

    Raises ValueError or TypeError for what cannot be trained.
    """
    leaves = _leaves(tree)
    if not leaves:
        raise ValueError("there are no parameters: give a pytree of arrays")
    for name, leaf in leaves:
        if not (isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise TypeError(f"{name} is {getattr(leaf, 'dtype', type(leaf).__name__)}: give arrays of floating numbers")
        if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1:
            raise TypeError(f"{name} lies on {len(leaf.devices())} devices: each rank trains on one")
    flat, unravel = ravel_pytree(tree)
    dtype = np.float64 if flat.dtype == np.float64 else np.float32
    x = empty(flat.size, dtype, np.empty(0))
    x[...] = flat
    rounds = any(jnp.finfo(leaf.dtype).eps > np.finfo(dtype).eps for _, leaf in leaves)
    ravel = jax.jit(lambda tree: ravel_pytree(tree)[0].astype(dtype))
    return x, ravel, jax.jit(lambda vector: unravel(vector.astype(flat.dtype))), rounds


def _bytes(leaf: Any) -> Array:
    """A copy of those of an array, or of a key."""
    return _numbers(leaf).reshape(-1).view(np.uint8).copy()


def _from_bytes(saved: Array, name: str, like: Any) -> Any:
    """The array, or the key, whose bytes were `saved`; raises ValueError where `like` is of another size."""
    numbers = _numbers(like)
    if saved.size != numbers.nbytes:
        raise ValueError(f"{name} of the checkpoint has {saved.size} bytes, not {numbers.nbytes}")
    found = jnp.array(saved.view(numbers.dtype).reshape(numbers.shape))
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(like)) if _is_key(like) else found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> Array:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
