"""Rate schedules: η by the number of the step."""

from collections.abc import Callable
from math import cos, pi
from typing import TypeAlias

import numpy as np

Schedule: TypeAlias = Callable[[int], float]
SCHEDULES = ("constant", "step", "cosine")


def positive(name: str, value: float) -> None:
    """Raise ValueError for what is no positive number."""
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def constant(rate: float) -> Schedule:
    """Rate η at every step."""
    positive("rate", rate)
    return lambda _step: rate


def step_decay(rate: float, every: int, factor: float = 0.1) -> Schedule:
    """η·factor^⌊step/every⌋.

    >>> [step_decay(1.0, every=2, factor=0.5)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    for name, value in (("rate", rate), ("every", every), ("factor", factor)):
        positive(name, value)
    return lambda step: rate * factor ** (step // every)


def cosine(rate: float, steps: int, final: float = 0.0) -> Schedule:
    """From η to `final` over `steps` steps along half a cosine, `final` afterwards (arXiv:1608.03983, one cycle).

    >>> [round(cosine(1.0, steps=2)(t), 3) for t in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    positive("rate", rate)
    positive("steps", steps)
    return lambda step: final + (rate - final) * (1 + cos(pi * min(step, steps) / steps)) / 2


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """`schedule`, its first `steps` steps scaled linearly up from 1/steps.

    >>> [warmup(constant(1.0), steps=4)(t) for t in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)
