"""The rules of exchange: what a worker commits, when it pulls, how it adopts, how the center weighs.

Letters: x parameters of the worker; o the center as last pulled; a sum of the raw gradients since then;
k local steps since then; c center; s staleness; α elastic rate. A rule is pure: it knows neither loop nor MPI.
"""

from collections.abc import Callable
from math import isfinite, prod
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ..arrays.backend import Array, blocks, on_host, scratch
from ..arrays.device_kernels import launch
from .optimizers import Optimizer

_LONG = 1 << 18  # elements; a fraction of a millisecond


def _adopt_center(x: Array, sent: Array, _delta: Array, c: Array) -> None:
    """x ← c + (x − sent), where sent is x when the delta was formed; without overlap sent is x: x ← c."""
    if sent is x:
        x[...] = c
        return
    if not on_host(x):
        launch("adopt", c, sent, x)
        return
    (s,) = scratch(x, 1)
    for part in blocks(x):
        block = x[part]
        block += np.subtract(c[part], sent[part], out=s[: part.stop - part.start])


def _adopt_elastic(x: Array, _sent: Array, delta: Array, _c: Array) -> None:
    """x ← x − delta."""
    x -= delta


class CommitInfo(NamedTuple):
    """What the center sees of a commit when it weighs it."""

    staleness: int  # s
    commits: int = 1  # deltas summed in the payload
    steps: int = 1  # k, local steps in it
    workers: int = 1  # n


Weight: TypeAlias = Callable[[CommitInfo], float]


def _whole(_seen: CommitInfo) -> float:
    return 1.0


class Rule(NamedTuple):
    """Four small things: delta, pull order, adopt, weight; and what the rule needs.

    `delta(x, o, a, k, out)` writes the commit; `adopt(x, sent, delta, c)` moves x after the pull;
    `weight(seen)` is the weight at the center; a commit of weight 0 is dropped, and its worker told.
    """

    name: str
    delta: Callable[[Array, Array, Array, int, Array], None]
    pulls: Literal["after", "before"] = "after"
    adopt: Callable[[Array, Array, Array, Array], None] = _adopt_center
    weight: Weight = _whole
    accumulates: bool = False  # needs a, an accumulator of its own
    allreduce: bool = False  # all ranks together, by Allreduce
    alpha: float = 0.0  # of the elastic rules

    @property
    def weighs(self) -> bool:
        """Whether the center needs to weigh commits."""
        return self.weight is not _whole

    @property
    def transport(self) -> str:
        """The transport that "auto" stands for."""
        return "allreduce" if self.allreduce else "p2p"


def _displacement(x: Array, o: Array, _a: Array, _k: int, out: Array) -> None:
    np.subtract(x, o, out=out)


def agn(variant: str = "displacement") -> Rule:
    """Accumulated Gradient Normalization: commit (x − o)/k, c ← c + commit, then x ← c.

    With constant-rate SGD x − o = Σ −η∇L, so this is the paper's a/λ (Hermans, Spanakis, Moeckel 2017,
    arXiv:1710.02368, algorithm 1); with any other local optimizer the accumulator is the displacement, as in
    the authors' code. `variant="gradient"` commits −a/k with a = Σ∇L, a pseudo-gradient that an optimizer at
    the center takes (TensorFlow 1.14, `tf.contrib.opt.AGNOptimizer`). k < λ in the last period.

    Raises ValueError for another variant.
    """

    def displacement(x: Array, o: Array, _a: Array, k: int, out: Array) -> None:
        if not on_host(x):
            launch("delta", x, o, k, out)
            return
        for part in blocks(x):
            d = np.subtract(x[part], o[part], out=out[part])
            d /= k

    def gradient(_x: Array, _o: Array, a: Array, k: int, out: Array) -> None:
        np.divide(a, -k, out=out)

    if variant == "displacement":
        return Rule("agn", displacement)
    if variant == "gradient":
        return Rule("agn", gradient, accumulates=True)
    raise ValueError(f"variant must be 'displacement' or 'gradient', not {variant!r}")


def downpour() -> Rule:
    """DOWNPOUR: commit x − o, c ← c + commit, then x ← c (Dean et al., NIPS 2012; displacement form)."""
    return Rule("downpour", _displacement)


def dynsgd() -> Rule:
    """DynSGD: DOWNPOUR whose commits the center weighs by 1/(s + 1) (Jiang et al., SIGMOD 2017)."""
    return Rule("dynsgd", _displacement, weight=lambda seen: 1 / (seen.staleness + 1))


def _elastic(name: str, alpha: float) -> Rule:
    if not 0 < alpha <= 1:
        raise ValueError(f"{name}: α = ηρ must lie in (0, 1], not {alpha!r}; lower rho or the rate")

    def delta(x: Array, o: Array, _a: Array, _k: int, out: Array) -> None:
        if not on_host(x):
            launch("elastic", x, o, alpha, out)
            return
        for part in blocks(x):
            d = np.subtract(x[part], o[part], out=out[part])
            d *= alpha

    return Rule(name, delta, pulls="before", adopt=_adopt_elastic, alpha=alpha)


def aeasgd(alpha: float) -> Rule:
    """Asynchronous elastic averaging: pull c, d = α(x − c), x ← x − d, c ← c + d (Zhang, Choromanska, LeCun 2015).

    `alpha`: α = ηρ in (0, 1] (arXiv:1412.6651, algorithm 1). Raises ValueError outside.
    """
    return _elastic("aeasgd", alpha)


def eamsgd(alpha: float) -> Rule:
    """AEASGD whose workers use Nesterov momentum (Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 2)."""
    return _elastic("eamsgd", alpha)


def _mean(seen: CommitInfo) -> float:
    return 1 / seen.commits


def synchronous() -> Rule:
    """Synchronous: c ← c + mean of x − o over all ranks, then x ← c; λ = 1 is data-parallel SGD, else local SGD."""
    return Rule("synchronous", _displacement, weight=_mean, allreduce=True)


def diloco() -> Rule:
    """DiLoCo-like: the mean displacement is the gradient of a Nesterov center (Douillard et al., arXiv:2311.08105)."""
    return Rule("diloco", _displacement, weight=_mean, allreduce=True)


RULES: dict[str, Callable[..., Rule]] = {
    f.__name__: f for f in (agn, downpour, dynsgd, aeasgd, eamsgd, synchronous, diloco)
}


def outer_rate(r: float) -> Weight:
    """Weight s = rk/n of AGN's commits (x − o)/k: c ← c + (r/n)(x − o).

    `r`: effective outer rate of a round of n commits, whatever n and λ are: r = 1 averages the displacements, r = n/λ
    is AGN itself, r = n DOWNPOUR. k is the commit's own number of steps, so that λ may differ between workers and the
    last period counts for what it is. Raises ValueError unless r is positive. Source: ours; as the outer rate of
    local SGD (Reddi et al. 2021, arXiv:2003.00295).

    >>> outer_rate(2.0)(CommitInfo(staleness=3, steps=10, workers=40))
    0.5
    """
    if not (r > 0 and isfinite(r)):
        raise ValueError(f"the outer rate r must be a positive number, not {r!r}")
    return lambda seen: r * seen.steps / seen.workers


def staleness_power(a: float) -> Weight:
    """Weight min(1, ((1 + E[s])/(1 + s))^a), E[s] = n − 1: commits of ordinary staleness stay whole; a = 0 is AGN.

    Raises ValueError for a negative a. Source: (1 + s)^−a of Xie, Koyejo, Gupta 2019 (arXiv:1903.03934), relative to
    the mean staleness of n equal workers, which is ours.

    >>> weight = staleness_power(0.5)
    >>> weight(CommitInfo(staleness=2, workers=4)), weight(CommitInfo(staleness=15, workers=4))
    (1.0, 0.5)
    """
    if not (a >= 0 and isfinite(a)):
        raise ValueError(f"the power a of the staleness weight must not be negative, but is {a!r}")
    return lambda seen: min(1.0, (seen.workers / (1 + seen.staleness)) ** a)


def staleness_cap(cap: int) -> Weight:
    """Weight 1 up to staleness `cap`, 0 above: what is too old is dropped, and its worker pulls afresh.

    Its steps are free again. Raises ValueError for a negative cap. Source: bounded staleness, here at the center (Ho
    et al., NIPS 2013, let the workers wait instead).
    """
    if cap < 0:
        raise ValueError(f"the cap on the staleness must not be negative, but is {cap!r}")
    return lambda seen: float(seen.staleness <= cap)


def weighted(rule: Rule, *weights: Weight) -> Rule:
    """`rule`, its weight multiplied by `weights`; the rule itself without any.

    Raises ValueError for elastic rules, which take from x what they add to c, and for collective ones.
    """
    if not weights:
        return rule
    if rule.pulls == "before" or rule.allreduce:
        raise ValueError(f"rule {rule.name} takes no further weights; they are of agn, downpour and dynsgd")
    factors = (rule.weight, *weights)
    return rule._replace(weight=lambda seen: prod(weight(seen) for weight in factors))


def center_step(
    c: Array,
    delta: Array,
    weight: float,
    optimizer: Optimizer | None,
    state: Any,
    steps: int = 0,
    on_block: Callable[[int], None] | None = None,
) -> Any:
    """Move the center in place: c ← c + weight·delta, or one step of `optimizer` on −weight·delta.

    `c`, `delta`: (n,); `delta` is not changed; `steps`: local steps in all earlier commits, where the schedule of
    the center's rate stands; `on_block`: called after each block, with its end, up to where c moves no more. Returns
    the new state of the optimizer.
    """
    if optimizer is not None:
        return optimizer.update(c, delta, state, scale=-weight, step=steps, on_block=on_block)
    if not on_host(c):
        launch("add", delta, weight, c)
        if on_block:
            on_block(c.size)
        return state
    plain = weight == 1.0  # then nothing is read twice, and blocks are there for `on_block` alone
    (s,) = (c,) if plain else scratch(c, 1)
    size = (_LONG if on_block else c.size) if plain else None
    for part in blocks(c, size=size):
        block, d = c[part], delta[part]
        block += d if plain else np.multiply(d, weight, out=s[: d.size])
        if on_block:
            on_block(part.stop)
    return state
