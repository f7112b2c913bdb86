"""Learning-rate schedules: η by the number of the step, counted over all workers together, from 0.

A schedule is a function `schedule(step) -> rate`; write your own, or combine these. It must be the same on every rank.
"""

from collections.abc import Callable
from math import cos, isfinite, pi
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int], float]


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive, finite number."""
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def constant(rate: float) -> Schedule:
    """The rate η at every step; what a number in place of a schedule stands for.

    Args:
        rate: η, positive.

    Returns:
        The schedule.

    Raises:
        ValueError: For a rate that is not positive and finite.

    >>> constant(0.5)(1000)
    0.5
    """
    positive("rate", rate)
    return lambda _step: rate


def step_decay(rate: float, every: int, factor: float = 0.1) -> Schedule:
    """η·factor^⌊step/every⌋: the rate drops by a factor after every `every` steps.

    Args:
        rate: η, the rate at first; positive.
        every: Steps between two drops, counted over all workers; positive.
        factor: The rate is multiplied by it at each drop; positive (default 0.1).

    Returns:
        The schedule.

    Raises:
        ValueError: For a number that is not positive and finite.

    >>> [step_decay(1.0, every=2, factor=0.5)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    for name, value in (("rate", rate), ("every", every), ("factor", factor)):
        positive(name, value)
    return lambda step: rate * factor ** (step // every)


def cosine(rate: float, steps: int, final: float = 0.0) -> Schedule:
    """final + (η − final)(1 + cos(π·step/steps))/2, and `final` from step `steps` on.

    Args:
        rate: η, the rate at step 0; positive.
        steps: Length of the half wave in steps, counted over all workers: usually of the whole run; positive.
        final: The rate at its end and afterwards (default 0).

    Returns:
        The schedule.

    Raises:
        ValueError: For a rate or a number of steps that is not positive and finite.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, one cycle without restarts.

    >>> [round(cosine(1.0, steps=2)(t), 3) for t in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    positive("rate", rate)
    positive("steps", steps)
    return lambda step: final + (rate - final) * (1 + cos(pi * min(step, steps) / steps)) / 2


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """`schedule` times min(1, (step + 1)/steps): its first steps rise linearly.

    Args:
        schedule: The schedule to warm up; it, too, counts from step 0.
        steps: Length of the rise in steps, counted over all workers; positive.

    Returns:
        The schedule.

    Raises:
        ValueError: For a number of steps that is not positive.

    Source: Goyal et al. 2017, arXiv:1706.02677, the gradual warmup.

    >>> [warmup(constant(1.0), steps=4)(t) for t in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


# By name on the command line: (rate, steps of the run, every, factor) -> the schedule.
SCHEDULES: dict[str, Callable[[float, int, int, float], Schedule]] = {
    "constant": lambda rate, _steps, _every, _factor: constant(rate),
    "step": lambda rate, _steps, every, factor: step_decay(rate, every, factor),
    "cosine": lambda rate, steps, _every, _factor: cosine(rate, steps),
}
