"""A reservoir: a bounded memory of a stream, in which every sample that came is as likely to be as any other."""

from typing import Any, TypeAlias

import numpy as np

Samples: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Reservoir:
    """At most `capacity` pairs (x, y) of all that were put: after m of them each is held with probability capacity/m.

    A solver's newest states are much alike; who trains on these alone forgets the old ones.

    Args:
        capacity: pairs held, at least 1.
        rng: draws which are kept, and the batches.

    Raises:
        ValueError: for a capacity below 1.

    Source: Vitter 1985, algorithm R; for in-situ training Meyer et al. 2023, arXiv:2309.16645.

    >>> reservoir = Reservoir(10, np.random.default_rng(0))
    >>> reservoir.put(np.arange(100.0).reshape(100, 1), np.arange(100.0))
    >>> reservoir.seen, len(reservoir)
    (100, 10)
    >>> x, y = reservoir.batch(3)
    >>> x.shape, bool((x[:, 0] == y).all())
    ((3, 1), True)
    """

    def __init__(self, capacity: int, rng: np.random.Generator) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a reservoir must be at least 1, not {capacity}")
        self.capacity, self.seen = capacity, 0  # seen: pairs put so far
        self._rng = rng
        self._held: tuple[Samples, Samples] | None = None

    def __len__(self) -> int:
        """Number of pairs held."""
        return min(self.seen, self.capacity)

    def put(self, x: Samples, y: Samples) -> None:
        """Offer pairs x (m, …), y (m, …): what is kept is copied. Raises ValueError for shapes that do not fit."""
        x, y = np.asarray(x), np.asarray(y)
        if not x.ndim or not y.ndim or len(x) != len(y):
            raise ValueError(f"put takes x (m, …) and y (m, …) of m samples, not shapes {x.shape} and {y.shape}")
        if self._held is None:
            self._held = tuple(np.empty((self.capacity, *a.shape[1:]), a.dtype) for a in (x, y))  # type: ignore[assignment]
        assert self._held is not None
        for name, held, a in zip("xy", self._held, (x, y)):
            if held.shape[1:] != a.shape[1:]:
                raise ValueError(f"samples {name} had shape {held.shape[1:]}, and have {a.shape[1:]} now")
        numbers = np.arange(self.seen, self.seen + len(x))
        # Number t, from 0, takes place t; a full reservoir puts it in place of another with probability capacity/(t+1).
        places = np.where(numbers < self.capacity, numbers, self._rng.integers(0, numbers + 1))
        kept = np.flatnonzero(places < self.capacity)
        for held, a in zip(self._held, (x, y)):
            held[places[kept]] = a[kept]  # of several for one place the last stays, as if they came one by one
        self.seen += len(x)

    def batch(self, size: int) -> tuple[Samples, Samples]:
        """Draw `size` pairs, with replacement: copies x (size, …), y (size, …)."""
        if self._held is None or not self.seen:
            raise ValueError("the reservoir is empty: put samples first")
        chosen = self._rng.integers(0, len(self), size)
        x, y = self._held
        return x[chosen], y[chosen]
