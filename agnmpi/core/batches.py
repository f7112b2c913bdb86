"""Which samples belong to a step.

Steps are numbered over the whole run and all workers. Step t of an epoch takes the t-th batch of that epoch's
seeded permutation; so a worker with step t knows its samples, and each sample of an epoch is used once. The
permutation is computed element by element: its memory does not grow with the number of samples (an epoch of up to 2 MB
is kept, since one call costs 0.1 ms however few elements it gives).
"""

import operator
from math import isqrt
from typing import TypeAlias

import numpy as np

from .leases import Lease

Integers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
_Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]
_ROUNDS = 8  # even, so that the two digits end in their places
# The multipliers of the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_KEPT = 1 << 18  # elements of a permutation that is kept
_MOST = 1 << 62  # steps of a run: what a message can hold


class Permutation:
    """A keyed bijection of 0 … size−1.

    A Feistel network on the digits of i = l + a·r, l < a, r < b, a·b just above `size`: each round adds to one digit,
    modulo a or b, a hash of the other. A result of `size` or more goes through again (cycle walking).

    Args:
        size: number of elements, at least 1.
        key: non-negative integers; each key gives a permutation of its own.

    Source: Black, Rogaway, CT-RSA 2002 (generalised Feistel ciphers on arbitrary domains).

    >>> sorted(Permutation(5, (1, 2))(range(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        root = isqrt(size - 1) + 1
        self.size = size
        self._digits = np.uint64(root), np.uint64(-(-size // root))
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: range) -> Integers:
        """The elements at `positions`, shape (len(positions),)."""
        values = self._encrypt(np.arange(positions.start, positions.stop, positions.step, dtype=np.uint64))
        while (beyond := values >= self.size).any():
            values[beyond] = self._encrypt(values[beyond])
        return values.astype(np.int64)

    def _encrypt(self, numbers: _Words) -> _Words:
        a, b = self._digits
        right, left = np.divmod(numbers, a)
        for key in self._keys:
            left, right = right, (left + _hash(right, key)) % a
            a, b = b, a
        return left + right * a


def _hash(numbers: _Words, key: np.uint64) -> _Words:
    """32 well-mixed bits of each number."""
    mixed = (numbers ^ key) * _FIRST
    mixed ^= mixed >> _HALF
    mixed *= _SECOND
    mixed >>= _HALF
    return mixed


class Plan:
    """The batches of a run.

    Args:
        samples: training samples.
        batch: samples in a step (the last of an epoch may be smaller).
        epochs: passes over the samples, may be fractional.
        steps: of the run, over all workers; overrides `epochs`.
        seed: orders the samples.

    Raises:
        ValueError: no samples, or a number of them that is no integer, an empty batch, no steps, or too many.

    >>> plan = Plan(samples=5, batch=2, epochs=1, seed=0)
    >>> plan.steps, sorted(i for t in range(3) for i in plan.indices(t).tolist())
    (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, samples: int, batch: int, epochs: float = 1, steps: int | None = None, seed: int = 0) -> None:
        try:
            samples = operator.index(samples)
        except TypeError:
            raise ValueError(
                f"the number of training samples must be an integer, not {samples!r} ({type(samples).__name__})"
            ) from None
        if samples < 1:
            raise ValueError(f"the problem has {samples} training samples")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self.samples, self.batch, self.seed = samples, min(batch, samples), seed
        self.steps_per_epoch = -(-samples // self.batch)
        wanted = epochs * self.steps_per_epoch if steps is None else steps
        if not wanted <= _MOST:
            raise ValueError(
                f"the run has too many steps, {wanted:g}: epochs {epochs:g} of {self.steps_per_epoch} steps"
            )
        self.steps = round(wanted)
        if self.steps < 1:
            raise ValueError(f"the run has no steps (epochs {epochs}, steps {steps}): give more epochs or steps")
        self._epoch, self._order = 0, Permutation(samples, (seed, 0))
        self._kept: Integers | None = None  # the epoch, whole, if it is short

    def indices(self, step: int) -> Integers:
        """Indices of the samples of `step`, shape (batch,), shorter at an epoch's end."""
        epoch, t = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order, self._kept = epoch, Permutation(self.samples, (self.seed, epoch)), None
        if self._kept is None and self.samples <= _KEPT:
            self._kept = self._order(range(self.samples))
        if self._kept is not None:
            return self._kept[t * self.batch : (t + 1) * self.batch]
        return self._order(range(t * self.batch, min((t + 1) * self.batch, self.samples)))

    def count(self, lease: Lease) -> int:
        """Number of samples in the steps of `lease`."""
        return self._before(lease.first + lease.steps) - self._before(lease.first)

    def _before(self, step: int) -> int:
        epoch, t = divmod(step, self.steps_per_epoch)
        return epoch * self.samples + t * self.batch
