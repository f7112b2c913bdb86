"""Optimizers as (init, update) pairs over one flat vector, and rate schedules.

An update works in place and in cache-sized blocks on the host: x, its gradient and its slots pass through
the cache once, and no temporary is longer than a block. On a device it works on the whole vector.
"""

from collections.abc import Callable, Sequence
from math import cos, pi, sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .backend import Array, blocks, namespace, scratch

Schedule: TypeAlias = Callable[[int], float]
Range: TypeAlias = tuple[int, int]


class Optimizer(NamedTuple):
    """A pair of functions; the state is a NamedTuple whose first field is the step count, the rest slots.

    `init(x) -> state`. `update(x, g, state, *, step=None, scale=1.0, ranges=None, between=None) -> state`: moves x
    (n,) in place against scale·g (n,); `step` is the position of the rate schedule (default: the own count),
    `ranges` the pieces of x that move (default: all of it), `between` is called between blocks. `g` is not changed.
    """

    name: str
    init: Callable[[Array], Any]
    update: Callable[..., Any]
    numbers: str = ""  # in words, to compare between ranks

    def slots(self, state: Any) -> dict[str, Array]:
        """The slot vectors of `state`, each (n,), by name."""
        return dict(list(state._asdict().items())[1:])


def _positive(name: str, value: float) -> None:
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {value!r}")


def constant(rate: float) -> Schedule:
    """Rate η at every step."""
    _positive("rate", rate)
    return lambda _step: rate


def step_decay(rate: float, every: int, factor: float = 0.1) -> Schedule:
    """η·factor^⌊step/every⌋.

    >>> [step_decay(1.0, every=2, factor=0.5)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    for name, value in (("rate", rate), ("every", every), ("factor", factor)):
        _positive(name, value)
    return lambda step: rate * factor ** (step // every)


def cosine(rate: float, steps: int, final: float = 0.0) -> Schedule:
    """From η to `final` over `steps` steps along half a cosine, `final` afterwards (arXiv:1608.03983, one cycle).

    >>> [round(cosine(1.0, steps=2)(t), 3) for t in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    _positive("rate", rate)
    _positive("steps", steps)
    return lambda step: final + (rate - final) * (1 + cos(pi * min(step, steps) / steps)) / 2


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """`schedule`, its first `steps` steps scaled linearly up from 1/steps.

    >>> [warmup(constant(1.0), steps=4)(t) for t in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    _positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


def global_norm(g: Array, ranges: Sequence[Range]) -> float:
    """‖g‖₂ over the ranges, summed in float64 from block to block."""
    return sqrt(sum(float(g[part] @ g[part]) for lo, hi in ranges for part in blocks(g, lo, hi)))


# A kernel moves one block x against g, in place, with the block's slots, two scratch arrays, the rate and
# the step count t (from 1).
Kernel: TypeAlias = Callable[[Array, Array, Sequence[Array], Array, Array, float, int], None]


def _make(
    name: str,
    state_type: type[Any],
    kernel: Kernel,
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

    def init(x: Array) -> Any:
        return state_type(0, *(namespace(x).zeros_like(x) for _ in slot_names))

    def update(
        x: Array,
        g: Array,
        state: Any,
        *,
        step: int | None = None,
        scale: float = 1.0,
        ranges: Sequence[Range] | None = None,
        between: Callable[[], None] | None = None,
    ) -> Any:
        count = state.step + 1
        eta = schedule(state.step if step is None else step)
        ranges = [(0, x.size)] if ranges is None else ranges
        if clip:
            norm = abs(scale) * global_norm(g, ranges)
            if norm > clip:
                scale *= clip / norm
        slots = state[1:]
        s, r, scaled = scratch(x, 3)
        for lo, hi in ranges:
            for part in blocks(x, lo, hi):
                xb, gb, size = x[part], g[part], part.stop - part.start
                if scale != 1.0:
                    gb = np.multiply(gb, scale, out=scaled[:size])
                if weight_decay and not decoupled:
                    decay = np.multiply(xb, weight_decay, out=s[:size])
                    gb = np.add(gb, decay, out=scaled[:size])
                elif weight_decay:
                    xb *= 1 - eta * weight_decay
                kernel(xb, gb, [slot[part] for slot in slots], s[:size], r[:size], eta, count)
                if between:
                    between()
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

    def kernel(x: Array, g: Array, _slots: Sequence[Array], s: Array, _r: Array, eta: float, _t: int) -> None:
        x -= np.multiply(g, eta, out=s)

    return _make("sgd", SgdState, kernel, rate, weight_decay, clip)


class MomentumState(NamedTuple):
    """State of `momentum` and `nesterov`."""

    step: int
    momentum: Array


def momentum(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Heavy ball: m ← βm + g, x ← x − ηm (Polyak 1964; the rate outside m, as PyTorch and TensorFlow).

    Raises ValueError unless 0 ≤ β < 1.
    """
    _fraction(beta=beta)

    def kernel(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: float, _t: int) -> None:
        (m,) = slots
        m *= beta
        m += g
        x -= np.multiply(m, eta, out=s)

    return _make("momentum", MomentumState, kernel, rate, weight_decay, clip, numbers=f", beta {beta:g}")


def nesterov(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Nesterov momentum: m ← βm + g, x ← x − η(g + βm) (Sutskever et al. 2013, the form without lookahead).

    Raises ValueError unless 0 ≤ β < 1.
    """
    _fraction(beta=beta)

    def kernel(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: float, _t: int) -> None:
        (m,) = slots
        m *= beta
        m += g
        np.multiply(m, beta, out=s)
        s += g
        s *= eta
        x -= s

    return _make("nesterov", MomentumState, kernel, rate, weight_decay, clip, numbers=f", beta {beta:g}")


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    step: int
    accumulator: Array


def adagrad(rate: float | Schedule, epsilon: float = 1e-10, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Adagrad: v ← v + g², x ← x − ηg/(√v + ε) (Duchi, Hazan, Singer 2011; diagonal, v from 0)."""
    _positive("epsilon", epsilon)

    def kernel(x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: float, _t: int) -> None:
        (v,) = slots
        v += np.multiply(g, g, out=s)
        np.sqrt(v, out=s)
        s += epsilon
        np.multiply(g, eta, out=r)
        x -= np.divide(r, s, out=s)

    return _make("adagrad", AdagradState, kernel, rate, weight_decay, clip, numbers=f", epsilon {epsilon:g}")


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
    _positive("epsilon", epsilon)

    def kernel(x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: float, _t: int) -> None:
        (v,) = slots
        np.multiply(g, g, out=s)
        s *= 1 - decay
        v *= decay
        v += s
        np.sqrt(v, out=s)
        s += epsilon
        np.multiply(g, eta, out=r)
        x -= np.divide(r, s, out=s)

    numbers = f", decay {decay:g}, epsilon {epsilon:g}"
    return _make("rmsprop", RmspropState, kernel, rate, weight_decay, clip, numbers=numbers)


class AdamState(NamedTuple):
    """State of `adam` and `adamw`."""

    step: int
    m: Array
    v: Array


def _adam(
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
    _positive("epsilon", epsilon)

    def kernel(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: float, t: int) -> None:
        m, v = slots
        np.subtract(g, m, out=s)
        s *= 1 - beta1
        m += s
        np.multiply(g, g, out=s)
        s -= v
        s *= 1 - beta2
        v += s
        # η m̂/(√v̂ + ε) with both bias corrections drawn into two scalars.
        root = sqrt(1 - beta2**t)
        np.sqrt(v, out=s)
        s += epsilon * root
        np.divide(m, s, out=s)
        s *= eta * root / (1 - beta1**t)
        x -= s

    numbers = f", beta1 {beta1:g}, beta2 {beta2:g}, epsilon {epsilon:g}"
    return _make(name, AdamState, kernel, rate, weight_decay, clip, decoupled, numbers)


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
    return _adam("adam", rate, beta1, beta2, epsilon, weight_decay, clip, decoupled=False)


def adamw(
    rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float = 0.0,
) -> Optimizer:
    """Adam with decoupled weight decay: x ← (1 − ηw)x before Adam's step (Loshchilov, Hutter, arXiv:1711.05101)."""
    return _adam("adamw", rate, beta1, beta2, epsilon, weight_decay, clip, decoupled=True)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    f.__name__: f for f in (sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw)
}
SCHEDULES = ("constant", "step", "cosine")
