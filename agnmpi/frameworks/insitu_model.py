"""What a run in situ trains, and the arguments that it is made with."""

from collections.abc import Mapping
from typing import Any, Protocol, get_args

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.placement import fault_tolerant
from ..core.optimizers import Optimizer, adam
from ..core.params import Layout
from ..core.rules import Weight, by_samples
from ..training.problem import load
from .insitu_center import Place
from .samples import Samples


class Surrogate(Protocol):
    """What a run trains: a model, its loss and its prediction, in a class that you write; without MPI.

    >>> class Line:  # y = w x
    ...     def init(self, rng):
    ...         return {"w": np.zeros(1)}
    ...     def gradient(self, params, x, y):
    ...         error = x * params["w"] - y
    ...         return (error**2).mean() / 2, {"w": (error * x).mean(keepdims=True)}
    ...     def predict(self, params, x):
    ...         return x * params["w"]
    """

    def init(self, rng: np.random.Generator) -> Mapping[str, Array]:
        """Make the initial parameters: NumPy arrays by name, float32 or float64; those of rank 0 are used."""

    def gradient(self, params: Mapping[str, Array], x: Samples, y: Samples) -> tuple[float, Mapping[str, Array]]:
        """Return the mean loss over a batch x (m, …), y (m, …), as they were put, and its gradients by name."""

    def predict(self, params: Mapping[str, Array], x: Samples) -> Samples:
        """Predict y (m, …) from x (m, …)."""


def checked(
    surrogate: str | Surrogate, comm: MPI.Comm, period: int, center: str, optimizer: Optimizer | None, batch: int,
    steps: int | None, outer_rate: float, seed: int, options: Mapping[str, Any],
) -> tuple[Surrogate, Layout, Array, Weight, Optimizer]:  # fmt: skip
    """Make the surrogate, the layout of its parameters, their vector (n,), the weight of commits and the optimizer.

    Raises ValueError or TypeError.
    """
    needed = ("init", "gradient", "predict")
    if isinstance(surrogate, str):
        made: Surrogate = load(surrogate, (), options, needed, "agnmpi.insitu.Surrogate")
    elif missing := [name for name in needed if not hasattr(surrogate, name)]:
        raise TypeError(f"{type(surrogate).__name__} has no {', '.join(missing)}: see agnmpi.insitu.Surrogate")
    else:
        made = surrogate
    for name, number in {"period": period, "batch": batch, "steps": 1 if steps is None else steps}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if center not in get_args(Place):
        raise ValueError(f"center must be one of {', '.join(get_args(Place))}, not {center!r}")
    if center == "rank" and comm.size < 2:
        raise ValueError('center="rank" needs another rank, which computes: there is one in all')
    if center == "none" and fault_tolerant():
        raise ValueError(
            'center="none" under mpiexec --with-ft ulfm: in its windows Open MPI may hang for ever when a rank dies; '
            'give center="solver", "thread" or "rank", or mpiexec without that option'
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must come from agnmpi (sgd, adam, …), not {optimizer!r}")
    weight = by_samples(outer_rate, period)
    initial = made.init(np.random.default_rng(seed))
    layout = Layout.of(initial)
    return made, layout, layout.pack(initial), weight, optimizer or adam(0.001)
