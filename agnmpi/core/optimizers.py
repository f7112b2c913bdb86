"""Optimizers as (init, update) pairs over one flat vector.

An update works in place, by one kernel (`arrays.kernels`) with weight decay and scaling in it: x, its gradient and its
slots pass through the cache once, and no temporary is longer than a block of it.

Letters, here and below: x parameters, g gradient, η rate, w weight decay, each of x's shape (n,) or a number.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, sqrt
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from ..arrays.backend import Array, Range, bring, zeros_like
from ..arrays.kernels import OnBlock, global_norm, run
from .schedules import Schedule, constant, positive

State: TypeAlias = Any  # a NamedTuple: `step`, the number of updates so far, and then the slots, vectors (n,)


class Update(Protocol):
    """The type of `Optimizer.update`."""

    def __call__(
        self,
        g: Array,
        state: State,
        x: Array,
        *,
        step: int | None = None,
        scale: float = 1.0,
        ranges: Sequence[Range] | None = None,
        on_block: OnBlock | None = None,
    ) -> State:
        """Move `x` (n,) in place against scale·g and return the new state."""


class Optimizer(NamedTuple):
    """A pair of functions over one flat vector; make your own for a worker or for the center.

    Args:
        name: One word, kept in checkpoints: a state is restored by an optimizer of the same name only.
        init: `init(x) -> state` for the vector x (n,), which it does not change. The state is a NamedTuple; its first
            field is `step`, the int 0, its other fields are the slots: vectors (n,) where x lies (`zeros_like(x)`).
            Checkpoints, fail-over and `get_slot` see slots by these names.
        update: `update(g, state, x, *, step, scale, ranges, on_block) -> state`: one step against the gradient
            scale·g. It moves x and the slots in place, leaves g (n,) as it is, and returns the state with `step` one
            higher.
            `step`: int, the position of a rate schedule (None, the default: its own count); `scale`: float
            (default 1.0), −weight at the center, where g is a delta; `ranges`: the pieces (start, stop) of x that
            have a gradient, in order (None: all of x), the rest and its slots do not change; `on_block`: None, or to be
            called as `on_block(stop)` whenever x[:stop] is final for this step, lastly with the end of the last
            range: replies are sent from there on.
        numbers: Its hyperparameters as text, such as "rate 0.1, beta 0.9"; they must be equal on all ranks.

    Source: the order of arguments is that of optax (`GradientTransformation`), which returns updates instead.

    >>> class Count(NamedTuple):
    ...     step: int
    >>> def update(g, state, x, *, step=None, scale=1.0, ranges=None, on_block=None):
    ...     for start, stop in [(0, x.size)] if ranges is None else ranges:
    ...         x[start:stop] -= 0.5 * np.sign(scale * g[start:stop])
    ...         if on_block:
    ...             on_block(stop)
    ...     return Count(state.step + 1)
    >>> signs = Optimizer("signs", lambda x: Count(0), update, "rate 0.5")
    >>> x = np.zeros(3)
    >>> signs.update(np.array([3.0, -2.0, 0.0]), signs.init(x), x)
    Count(step=1)
    >>> x
    array([-0.5,  0.5,  0. ])
    """

    name: str
    init: Callable[[Array], State]
    update: Update
    numbers: str = ""

    def slots(self, state: State) -> dict[str, Array]:
        """Name the slot vectors of `state`, each (n,). Raises TypeError for a state of another form."""
        names = getattr(state, "_fields", ())
        if names[:1] != ("step",):
            raise TypeError(
                f"the state of optimizer {self.name} must be a NamedTuple whose first field is step, not {state!r}"
            )
        return {name: getattr(state, name) for name in names[1:]}

    def restore(self, state: State, arrays: Mapping[str, Array], step: int) -> State:
        """Restore the slots and the step count of `state` from a checkpoint.

        Args:
            state: of this optimizer, for a vector like the one that was saved; its slots are written to.
            arrays: by "slot/NAME", wherever they lie.
            step: steps taken.

        Raises:
            ValueError: if a slot is missing.
        """
        slots = self.slots(state)
        if missing := sorted(name for name in slots if f"slot/{name}" not in arrays):
            raise ValueError(f"the state lacks the slots {missing} of optimizer {self.name}")
        for name, slot in slots.items():
            slot[...] = bring(arrays[f"slot/{name}"], slot)
        return state._replace(step=step)


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {value!r}")


class _Method(NamedTuple):
    """What distinguishes one of our optimizers from another, and the numbers that all have."""

    name: str
    kernel: str  # in KERNELS
    state: type[Any]
    scalars: Callable[[float, int, np.dtype[Any]], Sequence[float]]  # of η, step count from 1, dtype: for the kernel
    schedule: Schedule
    weight_decay: float
    clip: float
    decoupled: bool  # weight decay acts on x directly, not on the gradient

    def init(self, x: Array) -> State:
        return self.state(0, *(zeros_like(x) for _ in self.state._fields[1:]))

    def update(
        self,
        g: Array,
        state: State,
        x: Array,
        *,
        step: int | None = None,
        scale: float = 1.0,
        ranges: Sequence[Range] | None = None,
        on_block: OnBlock | None = None,
    ) -> State:
        count = state.step + 1
        eta = self.schedule(state.step if step is None else step)
        if self.clip:
            norm = abs(scale) * global_norm(g, [(0, x.size)] if ranges is None else ranges)
            if norm > self.clip:
                scale *= self.clip / norm
        decay, keep = (0.0, 1 - eta * self.weight_decay) if self.decoupled else (self.weight_decay, 1.0)
        scalars = scale, decay, keep, *self.scalars(eta, count, x.dtype)
        run(self.kernel, [g], scalars, [x, *state[1:]], ranges, on_block)
        return state._replace(step=count)


def _make(
    name: str,
    kernel: str,
    state: type[Any],
    scalars: Callable[[float, int, np.dtype[Any]], Sequence[float]],
    rate: float | Schedule,
    weight_decay: float,
    clip: float,
    decoupled: bool = False,
    **numbers: float,
) -> Optimizer:
    schedule = rate if callable(rate) else constant(rate)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, but is {weight_decay!r}")
    if not clip >= 0:
        raise ValueError(f"clip must not be negative, but is {clip!r} (0 means no clipping)")
    method = _Method(name, kernel, state, scalars, schedule, weight_decay, clip, decoupled)
    texts = ["rate schedule" if callable(rate) else f"rate {rate:g}"]
    texts += [f"{key} {value:g}" for key, value in {"weight_decay": weight_decay, "clip": clip, **numbers}.items()]
    return Optimizer(name, method.init, method.update, ", ".join(texts))


class SgdState(NamedTuple):
    """State of `sgd`."""

    step: int


def sgd(rate: float | Schedule, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Stochastic gradient descent: x ← x − η(g + wx).

    Args:
        rate: η, in units of x per unit of g: a positive number, or a schedule, a function of the step's number
            (`agnmpi.schedules`), counted over all workers together.
        weight_decay: w, per step and unit of rate, at least 0 (default 0: none); adds wx to g, after clipping.
        clip: Largest ‖g‖₂ over all of x, in units of g; a longer g is scaled down to it (default 0: none is).

    Returns:
        An Optimizer without slots.

    Raises:
        ValueError: For a rate that is not positive and finite, or a negative weight_decay or clip.

    Source: Robbins and Monro 1951; clipping as Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063.

    >>> x = np.array([1.0, 2.0])
    >>> opt = sgd(0.5)
    >>> state = opt.update(np.array([1.0, 1.0]), opt.init(x), x)
    >>> x
    array([0.5, 1.5])
    """
    return _make("sgd", "sgd", SgdState, lambda eta, _t, _dtype: (eta,), rate, weight_decay, clip)


class MomentumState(NamedTuple):
    """State of `momentum`, `nesterov` and `optimistic`."""

    step: int
    momentum: Array


def momentum(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Heavy ball: m ← βm + g, x ← x − ηm.

    Args:
        rate: η, a positive number or a schedule; see `sgd`. After many steps along one g the step is ηg/(1 − β).
        beta: β, what is kept of m in each step, in [0, 1) (default 0.9).
        weight_decay: w, at least 0 (default 0); adds wx to g, and so to m.
        clip: Largest ‖g‖₂, of g before it enters m (default 0: no clipping).

    Returns:
        An Optimizer with the slot `momentum`, m (n,), which starts at 0.

    Raises:
        ValueError: Unless 0 ≤ β < 1, and as `sgd`.

    Source: Polyak 1964; the rate outside of m, as in PyTorch and TensorFlow, so that a change of η acts at once.

    >>> x, opt = np.zeros(1), momentum(1.0, beta=0.5)
    >>> state = opt.init(x)
    >>> for _ in range(2):
    ...     state = opt.update(np.ones(1), state, x)
    >>> x, state.momentum
    (array([-2.5]), array([1.5]))
    """
    _fraction(beta=beta)
    return _make(
        "momentum", "momentum", MomentumState, lambda eta, _t, _dtype: (eta, beta), rate, weight_decay, clip, beta=beta
    )


def nesterov(rate: float | Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Nesterov momentum: m ← βm + g, x ← x − η(g + βm).

    Args:
        rate: η, a positive number or a schedule; see `sgd`.
        beta: β, what is kept of m in each step, in [0, 1) (default 0.9).
        weight_decay: w, at least 0 (default 0); adds wx to g, and so to m.
        clip: Largest ‖g‖₂, of g before it enters m (default 0: no clipping).

    Returns:
        An Optimizer with the slot `momentum`, m (n,), which starts at 0.

    Raises:
        ValueError: Unless 0 ≤ β < 1, and as `sgd`.

    Source: Sutskever, Martens, Dahl, Hinton 2013, in the form without a look ahead, as PyTorch's SGD(nesterov=True).

    >>> x, opt = np.zeros(1), nesterov(1.0, beta=0.5)
    >>> state = opt.init(x)
    >>> for _ in range(2):
    ...     state = opt.update(np.ones(1), state, x)
    >>> x, state.momentum
    (array([-3.25]), array([1.5]))
    """
    _fraction(beta=beta)
    return _make(
        "nesterov", "nesterov", MomentumState, lambda eta, _t, _dtype: (eta, beta, beta), rate, weight_decay, clip,
        beta=beta,
    )  # fmt: skip


def optimistic(
    rate: float | Schedule, span: float = 4.0, strength: float = 1.0, weight_decay: float = 0.0, clip: float = 0.0
) -> Optimizer:
    """Optimistic descent: x ← x − η(g + γ(g − ḡ)), then ḡ ← ḡ + (g − ḡ)/T, the running mean.

    x is ηγTḡ ahead of where plain steps would have brought it. For the center of asynchronous workers, with the rate 1
    and T = n: a commit meets a center that has moved by n − 1 others meanwhile, and with γ = 1 what a worker pulls is
    where the center will be a round later. For λ of 1 or 2, and a schedule that ends near 0: there ḡ vanishes, and x is
    ahead of itself no more. With λ = 10 it is ahead by noise, and learns less than without.

    Args:
        rate: η, a positive number or a schedule; see `sgd`.
        span: T, in steps, above 1 (default 4): how many the running mean is of.
        strength: γ, at least 0 (default 1); 0 is `sgd`.
        weight_decay: w, at least 0 (default 0); adds wx to g, and so to ḡ.
        clip: Largest ‖g‖₂, of g before it enters ḡ (default 0: no clipping).

    Returns:
        An Optimizer with the slot `momentum`, Tḡ (n,), which starts at 0.

    Raises:
        ValueError: For a span of 1 or less, a negative strength, and as `sgd`.

    Source: Daskalakis, Ilyas, Syrgkanis, Zeng 2018, arXiv:1711.00141 (T = 1: ḡ is the last g); the running mean is
    ours. It is a momentum below 0, as Mitliagkas, Zhang, Hadjis, Ré 2016, arXiv:1605.09774, recommend against
    asynchrony.

    >>> x, opt = np.zeros(1), optimistic(1.0, span=2.0)
    >>> state = opt.init(x)
    >>> for _ in range(3):
    ...     state = opt.update(np.ones(1), state, x)
    ...     print(float(x[0]))
    -2.0
    -3.5
    -4.75
    """
    if not (1 < span < inf and 0 <= strength < inf):
        raise ValueError(f"span must be above 1, strength at least 0, both finite, not {span!r} and {strength!r}")
    behind = strength / (span - 1)  # g + γ(g − ḡ) = (1 + γ + b)g − bm, with m = Tḡ after g has entered it
    ahead = 1 + strength + behind

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta * ahead, 1 - 1 / span, -behind / ahead

    return _make(
        "optimistic", "nesterov", MomentumState, scalars, rate, weight_decay, clip, span=span, strength=strength
    )


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    step: int
    accumulator: Array


def adagrad(rate: float | Schedule, epsilon: float = 1e-10, weight_decay: float = 0.0, clip: float = 0.0) -> Optimizer:
    """Adagrad: v ← v + g², x ← x − ηg/(√v + ε), element by element.

    Args:
        rate: η, in units of x: the length of the first step of each element; a positive number or a schedule.
        epsilon: ε, in units of g, positive (default 1e-10); outside of the root.
        weight_decay: w, at least 0 (default 0); adds wx to g.
        clip: Largest ‖g‖₂ (default 0: no clipping).

    Returns:
        An Optimizer with the slot `accumulator`, v (n,), which starts at 0.

    Raises:
        ValueError: For an ε that is not positive, and as `sgd`.

    Source: Duchi, Hazan, Singer 2011, the diagonal form; v from 0, as PyTorch (TensorFlow's starts at 0.1).

    >>> x, opt = np.zeros(2), adagrad(0.5)
    >>> state = opt.update(np.array([4.0, -0.1]), opt.init(x), x)
    >>> x.round(6)
    array([-0.5,  0.5])
    """
    positive("epsilon", epsilon)

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta, epsilon

    return _make("adagrad", "adagrad", AdagradState, scalars, rate, weight_decay, clip, epsilon=epsilon)


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
    """RMSprop: v ← ρv + (1 − ρ)g², x ← x − ηg/(√v + ε), element by element.

    Args:
        rate: η, in units of x; a positive number or a schedule. The first step is η/√(1 − ρ) long.
        decay: ρ, what is kept of v in each step, in [0, 1) (default 0.9).
        epsilon: ε, in units of g, positive (default 1e-8); outside of the root (optax has it inside).
        weight_decay: w, at least 0 (default 0); adds wx to g.
        clip: Largest ‖g‖₂ (default 0: no clipping).

    Returns:
        An Optimizer with the slot `mean_square`, v (n,), which starts at 0.

    Raises:
        ValueError: Unless 0 ≤ ρ < 1, for an ε that is not positive, and as `sgd`.

    Source: Tieleman and Hinton 2012 (lecture 6.5); without momentum, not centered.

    >>> x, opt = np.zeros(2), rmsprop(0.5, decay=0.75)
    >>> state = opt.update(np.array([4.0, -0.1]), opt.init(x), x)
    >>> x.round(6)
    array([-1.,  1.])
    """
    _fraction(decay=decay)
    positive("epsilon", epsilon)

    def scalars(eta: float, _t: int, _dtype: np.dtype[Any]) -> Sequence[float]:
        return eta, decay, 1 - decay, epsilon

    return _make("rmsprop", "rmsprop", RmspropState, scalars, rate, weight_decay, clip, decay=decay, epsilon=epsilon)


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
        b1, b2 = _as_stored(beta1, dtype), _as_stored(beta2, dtype)
        # η m̂/(√v̂ + ε) with both bias corrections folded into two scalars.
        root = sqrt(1 - b2**t)
        return b1, 1 - b1, b2, 1 - b2, epsilon * root, eta * root / (1 - b1**t)

    numbers = {"beta1": beta1, "beta2": beta2, "epsilon": epsilon}
    return _make(name, "adam", AdamState, scalars, rate, weight_decay, clip, decoupled, **numbers)


def _as_stored(beta: float, dtype: np.dtype[Any]) -> float:
    """β rounded to `dtype`: for the float32 nearest 0.999, 1 − β is smaller than 0.001 by 1.3e-5 of it."""
    stored = float(dtype.type(beta))
    return stored if stored < 1 else beta


def adam(
    rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 0.0,
) -> Optimizer:
    """Adam: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², x ← x − η m̂/(√v̂ + ε), element by element.

    m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ) at the t-th step of this optimizer, t from 1.

    Args:
        rate: η, in units of x: the length of the first step of each element; a positive number or a schedule.
        beta1: β₁, what is kept of m in each step, in [0, 1) (default 0.9).
        beta2: β₂, what is kept of v in each step, in [0, 1) (default 0.999).
        epsilon: ε, in units of g, positive (default 1e-8); outside of the root.
        weight_decay: w, at least 0 (default 0); adds wx to g, and so to m and v.
        clip: Largest ‖g‖₂ (default 0: no clipping).

    Returns:
        An Optimizer with the slots `m` and `v`, each (n,), which start at 0.

    Raises:
        ValueError: Unless 0 ≤ β₁, β₂ < 1, for an ε that is not positive, and as `sgd`.

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.

    >>> x, opt = np.zeros(2), adam(0.5)
    >>> state = opt.update(np.array([4.0, -0.1]), opt.init(x), x)
    >>> x.round(6)
    array([-0.5,  0.5])
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
    """Adam with decoupled weight decay: x ← (1 − ηw)x, then Adam's step without w.

    Args:
        rate: η, in units of x: the length of the first step of each element; a positive number or a schedule.
        beta1: β₁, what is kept of m in each step, in [0, 1) (default 0.9).
        beta2: β₂, what is kept of v in each step, in [0, 1) (default 0.999).
        epsilon: ε, in units of g, positive (default 1e-8); outside of the root.
        weight_decay: w, per step and unit of rate, at least 0 (default 0.01); m and v do not see it.
        clip: Largest ‖g‖₂ (default 0: no clipping).

    Returns:
        An Optimizer with the slots `m` and `v`, each (n,), which start at 0.

    Raises:
        ValueError: As `adam`.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, with ηw for the decay, as PyTorch.

    >>> x, opt = np.array([10.0]), adamw(0.5, weight_decay=0.1)
    >>> state = opt.update(np.array([4.0]), opt.init(x), x)
    >>> x.round(6)
    array([9.])
    """
    return _adam_like("adamw", rate, beta1, beta2, epsilon, weight_decay, clip, decoupled=True)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    f.__name__: f for f in (sgd, momentum, nesterov, optimistic, adagrad, rmsprop, adam, adamw)
}
