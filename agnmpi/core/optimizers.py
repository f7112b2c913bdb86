"""Optimizers as (init, update) pairs over one flat vector.

An update works in place and in cache-sized blocks on the host: x, its gradient and its slots pass through
the cache once, and no temporary is longer than a block. On a device it is one launch of the kernel of the same name
in `kernels`, with weight decay and scaling in it.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..arrays.backend import Array, blocks, full_like, on_host, scratch
from ..arrays.device_kernels import launch
from ..arrays.host_kernels import HOST
from .schedules import Schedule, constant, positive

Range: TypeAlias = tuple[int, int]


class Optimizer(NamedTuple):
    """A pair of functions; the state is a NamedTuple whose first field is the step count, the rest slots.

    `init(x) -> state`. `update(x, g, state, *, step=None, scale=1.0, ranges=None, on_block=None) -> state`: moves x
    (n,) in place against scale·g (n,); `step` is the position of the rate schedule (default: the own count),
    `ranges` the pieces of x that move (default: all of it), `on_block` is called after each block, with its end: up to
    there x moves no more, and may be read.
    """

    name: str
    init: Callable[[Array], Any]
    update: Callable[..., Any]
    numbers: str = ""  # in words, to compare between ranks

    def slots(self, state: Any) -> dict[str, Array]:
        """The slot vectors of `state`, each (n,), by name."""
        return dict(list(state._asdict().items())[1:])


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {value!r}")


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """`ranges`, with those that follow on each other made one: fewer launches.

    >>> _joined([(0, 3), (3, 5), (7, 9)])
    [(0, 5), (7, 9)]
    """
    joined: list[Range] = []
    for lo, hi in ranges:
        if joined and joined[-1][1] == lo:
            lo = joined.pop()[0]
        joined.append((lo, hi))
    return joined


def global_norm(g: Array, ranges: Sequence[Range]) -> float:
    """‖g‖₂ over the ranges: on the host summed in float64 from block to block, on a device in g's dtype."""
    if on_host(g):
        return sqrt(sum(float(g[part] @ g[part]) for lo, hi in ranges for part in blocks(g, lo, hi)))
    squares = [g[lo:hi] @ g[lo:hi] for lo, hi in _joined(ranges)]
    return sqrt(float(sum(squares[1:], squares[0]))) if squares else 0.0  # the one wait for the device


def _make(
    name: str,
    state_type: type[Any],
    kernel: str,
    scalars: Callable[[float, int, np.dtype[Any]], Sequence[float]],  # of rate, step count from 1, dtype
    rate: float | Schedule,
    weight_decay: float,
    clip: float,
    decoupled: bool = False,
    numbers: str = "",
) -> Optimizer:
    schedule = rate if callable(rate) else constant(rate)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, but is {weight_decay!r}")
    if not clip >= 0:
        raise ValueError(f"clip must not be negative, but is {clip!r} (0 means no clipping)")
    slot_names = state_type._fields[1:]
    host = HOST[kernel]

    def init(x: Array) -> Any:
        return state_type(0, *(full_like(x, 0) for _ in slot_names))

    def update(
        x: Array,
        g: Array,
        state: Any,
        *,
        step: int | None = None,
        scale: float = 1.0,
        ranges: Sequence[Range] | None = None,
        on_block: Callable[[int], None] | None = None,
    ) -> Any:
        count = state.step + 1
        eta = schedule(state.step if step is None else step)
        ranges = [(0, x.size)] if ranges is None else ranges
        if clip:
            norm = abs(scale) * global_norm(g, ranges)
            if norm > clip:
                scale *= clip / norm
        slots, now = state[1:], scalars(eta, count, x.dtype)
        if not on_host(x):
            keep = 1 - eta * weight_decay if decoupled else 1.0
            decay = 0.0 if decoupled else weight_decay
            for lo, hi in _joined(ranges):
                launch(kernel, g[lo:hi], scale, decay, keep, *now, x[lo:hi], *(slot[lo:hi] for slot in slots))
                if on_block:
                    on_block(hi)
            return state._replace(step=count)
        constants = [np.array(number, x.dtype) for number in now]
        s, r, scaled = scratch(x, 3)
        for lo, hi in ranges:
            for part in blocks(x, lo, hi):
                xb, gb, size = x[part], g[part], part.stop - part.start
                if scale != 1.0:
                    gb = np.multiply(gb, scale, out=scaled[:size])
                if weight_decay and not decoupled:
                    wx = np.multiply(xb, weight_decay, out=s[:size])
                    gb = np.add(gb, wx, out=scaled[:size])
                elif weight_decay:
                    xb *= 1 - eta * weight_decay
                host(xb, gb, [slot[part] for slot in slots], s[:size], r[:size], *constants)
                if on_block:
                    on_block(part.stop)
        return state._replace(step=count)

    said = "schedule" if callable(rate) else f"{rate:g}"
    return Optimizer(name, init, update, f"rate {said}, weight_decay {weight_decay:g}, clip {clip:g}{numbers}")


class SgdState(NamedTuple):
    """State of `sgd`."""

    step: int


def sgd(rate: float | Schedule, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Stochastic gradient descent: x ← x − ηg.

    `rate`: η, a number or a schedule; `weight_decay`: w, adds wx to g; `clip`: largest norm of g, 0 for none.
    Raises ValueError for a rate that is not positive or a negative w or clip.

    >>> x = np.array([1.0, 2.0])
    >>> opt = sgd(0.5)
    >>> state = opt.update(x, np.array([1.0, 1.0]), opt.init(x))
    >>> x
    array([0.5, 1.5])
    """

    return _make("sgd", SgdState, "sgd", lambda eta, _t, _dtype: (eta,), rate, weight_decay, clip)


class MomentumState(NamedTuple):
    """State of `momentum` and `nesterov`."""

    step: int
    momentum: Array


def momentum(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Heavy ball: m ← βm + g, x ← x − ηm (Polyak 1964; the rate outside m, as PyTorch and TensorFlow).

    Raises ValueError unless 0 ≤ β < 1.
    """
    return _momentum_like("momentum", rate, beta, weight_decay, clip)


def nesterov(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Nesterov momentum: m ← βm + g, x ← x − η(g + βm) (Sutskever et al. 2013, the form without lookahead).

    Raises ValueError unless 0 ≤ β < 1.
    """
    return _momentum_like("nesterov", rate, beta, weight_decay, clip)


def _momentum_like(name: str, rate: float | Schedule, beta: float, weight_decay: float, clip: float) -> Optimizer:
    _fraction(beta=beta)

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta, beta

    return _make(name, MomentumState, name, scalars, rate, weight_decay, clip, numbers=f", beta {beta:g}")


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    step: int
    accumulator: Array


def adagrad(rate: float | Schedule, epsilon: float = 1e-10, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Adagrad: v ← v + g², x ← x − ηg/(√v + ε) (Duchi, Hazan, Singer 2011; diagonal, v from 0)."""
    positive("epsilon", epsilon)

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta, epsilon

    numbers = f", epsilon {epsilon:g}"
    return _make("adagrad", AdagradState, "adagrad", scalars, rate, weight_decay, clip, numbers=numbers)


class RmspropState(NamedTuple):
    """State of `rmsprop`."""

    step: int
    mean_square: Array


def rmsprop(
    rate: float | Schedule,
    decay: float = 0.9,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 0.0,
) -> Optimizer:
    """RMSprop: v ← ρv + (1−ρ)g², x ← x − ηg/(√v + ε) (Tieleman, Hinton 2012; no momentum, not centered).

    Raises ValueError unless 0 ≤ ρ < 1.
    """
    _fraction(decay=decay)
    positive("epsilon", epsilon)

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta, decay, 1 - decay, epsilon

    numbers = f", decay {decay:g}, epsilon {epsilon:g}"
    return _make("rmsprop", RmspropState, "rmsprop", scalars, rate, weight_decay, clip, numbers=numbers)


class AdamState(NamedTuple):
    """State of `adam` and `adamw`."""

    step: int
    m: Array
    v: Array


def _adam_like(
    name: str,
    rate: float | Schedule,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    clip: float,
    decoupled: bool,
) -> Optimizer:
    _fraction(beta1=beta1, beta2=beta2)
    positive("epsilon", epsilon)

    def scalars(eta: float, t: int, dtype: np.dtype[Any]) -> Sequence[float]:
        held1, held2 = _held(beta1, dtype), _held(beta2, dtype)
        # η m̂/(√v̂ + ε) with both bias corrections drawn into two scalars.
        root = sqrt(1 - held2**t)
        return held1, 1 - held1, held2, 1 - held2, epsilon * root, eta * root / (1 - held1**t)

    numbers = f", beta1 {beta1:g}, beta2 {beta2:g}, epsilon {epsilon:g}"
    return _make(name, AdamState, "adam", scalars, rate, weight_decay, clip, decoupled, numbers)


def _held(beta: float, dtype: np.dtype[Any]) -> float:
    """β as `dtype` holds it: of the float32 next to 0.999, 1 − β is not 0.001 but 1.3e-5 of it less."""
    held = float(dtype.type(beta))
    return held if held < 1 else beta


def adam(
    rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 0.0,
) -> Optimizer:
    """Adam: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², x ← x − η m̂/(√v̂ + ε) (Kingma, Ba 2015, arXiv:1412.6980).

    m̂ and v̂ are corrected for bias; weight decay adds wx to g. Raises ValueError unless 0 ≤ β₁, β₂ < 1.
    """
    return _adam_like("adam", rate, beta1, beta2, epsilon, weight_decay, clip, decoupled=False)


def adamw(
    rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float = 0.0,
) -> Optimizer:
    """Adam with decoupled weight decay: x ← (1 − ηw)x before Adam's step (Loshchilov, Hutter, arXiv:1711.05101)."""
    return _adam_like("adamw", rate, beta1, beta2, epsilon, weight_decay, clip, decoupled=True)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    f.__name__: f for f in (sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw)
}


class DelayedNesterovState(NamedTuple):
    """State of `delayed_nesterov`."""

    step: int
    momentum: Array
    buffer: Array


def delayed_nesterov(rate: float | Schedule = 1.0, every: int = 1, beta: float = 0.5) -> Optimizer:
    """Delayed Nesterov, for the center: the momentum moves every N commits only, by all that came since.

    B ← B + g, x ← x − ηg; at every N-th g also m ← βm + B, x ← x − ηβm, B ← 0. `rate`: η; `every`: N, usually n;
    `beta`: β. With ε = ηN and m/N for m it is the published form, whose rate is ε; η = 1 and β = 0 add, as AGN does.

    Raises ValueError unless 0 ≤ β < 1 and N ≥ 1. Source: Liu et al. 2024, arXiv:2401.09135, algorithm 3, with c = 0.
    """
    _fraction(beta=beta)
    if every < 1:
        raise ValueError(f"every is a number of commits, at least 1, not {every!r}")

    def scalars(eta: float, t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return (eta, 0.0, 1.0, 0.0, 1.0) if t % every else (eta, eta * beta, beta, 1.0, 0.0)

    name = "delayed_nesterov"
    return _make(name, DelayedNesterovState, name, scalars, rate, 0.0, 0.0, numbers=f", every {every}, beta {beta:g}")


# At the center also:
CENTER_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {**OPTIMIZERS, "delayed_nesterov": delayed_nesterov}
