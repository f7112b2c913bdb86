"""Which samples a step takes.

Steps are numbered over the whole run and all workers. Step t of an epoch takes the t-th batch of that epoch's
seeded permutation; so whoever is granted step t knows its samples, and each sample of an epoch is used once.
"""

import numpy as np

from .leases import Lease


class Plan:
    """The batches of a run.

    `samples`: training samples; `batch`: samples in a step (the last of an epoch may be smaller);
    `epochs`: passes over the samples, may be fractional; `steps` overrides it; `seed` orders the samples.

    >>> plan = Plan(samples=5, batch=2, epochs=1, seed=0)
    >>> plan.steps, sorted(i for t in range(3) for i in plan.indices(t).tolist())
    (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, samples: int, batch: int, epochs: float = 1, steps: int | None = None, seed: int = 0) -> None:
        if samples < 1:
            raise ValueError(f"the problem has {samples} training samples")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self.samples, self.batch, self.seed = samples, min(batch, samples), seed
        self.steps_per_epoch = -(-samples // self.batch)
        self.steps = round(epochs * self.steps_per_epoch) if steps is None else steps
        if self.steps < 1:
            raise ValueError(f"the run has no steps: epochs {epochs}, steps {steps}")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Indices of the samples of `step`, shape (batch,), shorter at an epoch's end."""
        epoch, t = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            self._epoch = epoch
        return self._order[t * self.batch : (t + 1) * self.batch]

    def count(self, lease: Lease) -> int:
        """Number of samples in the steps of `lease`."""
        return self._before(lease.first + lease.steps) - self._before(lease.first)

    def _before(self, step: int) -> int:
        epoch, t = divmod(step, self.steps_per_epoch)
        return epoch * self.samples + t * self.batch
