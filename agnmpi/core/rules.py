"""The rules of exchange: what a worker commits, when it pulls, how it adopts the pull, how the center weighs commits.

Letters: x parameters of the worker; o the center as last pulled; a sum of the raw gradients since then;
k local steps since then; c center; s staleness; n workers; λ period; η rate; α elastic rate. A rule is pure: it knows
neither loop nor MPI.
"""

from collections.abc import Callable
from math import isfinite, prod
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ..arrays.backend import Array, empty_like
from ..arrays.encodings import NAMES, Encoding, get
from ..arrays.kernels import all_finite, run
from .optimizers import Optimizer


def _adopt_center(x: Array, sent: Array, _delta: Array, c: Array) -> None:
    """x ← c + (x − sent), where sent is x when the delta was formed; without overlap sent is x: x ← c."""
    if sent is x:
        x[...] = c
    else:
        run("adopt", [c, sent], [], [x])


def _adopt_elastic(x: Array, _sent: Array, delta: Array, _c: Array) -> None:
    """x ← x − delta."""
    run("add", [delta], [-1], [x])


class CommitInfo(NamedTuple):
    """What a weight depends on: a commit as the center sees it, just before it is applied.

    Args:
        staleness: s, commits that the center has applied since this worker pulled, at least 0.
        commits: Deltas summed in it: 1, or all n of a round with Allreduce (default 1).
        steps: k, local steps in it: λ, or fewer in the last period (default 1).
        workers: n, those that are alive (default 1).
        share: p, its worker's share of the samples of all workers (default 1); 1/n where all draw from the same.
    """

    staleness: int
    commits: int = 1
    steps: int = 1
    workers: int = 1
    share: float = 1.0


Weight: TypeAlias = Callable[[CommitInfo], float]


def _full(_commit: CommitInfo) -> float:
    return 1.0


class Rule(NamedTuple):
    """A rule of exchange: four small functions, and what they need. Write your own, or use those of this module.

    The vectors are those of one worker, each (n,) of one dtype, on the host or on its device.

    Args:
        name: One word, for logs and checkpoints.
        delta: `delta(x, o, a, k, out)` writes the commit into `out`: x parameters, o the center as last pulled,
            a the sum of the raw gradients since then (x itself unless `accumulates`), k local steps since then, an int.
            It may return whether all of the commit is finite; None: it has not looked.
        pulls: "after" (default): commit, then pull and adopt; "before": pull, then form the delta against that pull.
        adopt: `adopt(x, sent, delta, c)` moves x after the pull: sent is x when the delta was formed (x itself
            without overlap), c what was pulled. Default: x ← c + (x − sent).
        weight: `weight(commit) -> float` of a `CommitInfo`: the center adds weight·delta, or gives −weight·delta to
            its optimizer as gradient. A commit of weight 0 is dropped: its reply says so, and its steps are free again.
            Default: 1.
        accumulates: Whether `delta` needs a, a vector of its own at each worker (default False).
        allreduce: Whether all ranks commit together and each keeps the center (default False).
        alpha: α of the elastic rules, 0 for all others; ranks must agree on it.
        buffers: How many numbers at the end of the vectors are buffers, such as the running means of batch
            normalization (default 0). None of the functions above sees them: a commit holds the buffers b themselves,
            the center takes their convex mean, c_b ← c_b + (b − c_b)/n, whatever the commit weighs (with Allreduce
            the mean of the round), and a worker that adopts c has c_b, too.

    >>> def half_way(x, o, a, k, out):
    ...     np.subtract(x, o, out=out)
    ...     out *= 0.5
    >>> Rule("half", half_way).weight(CommitInfo(staleness=7))
    1.0
    """

    name: str
    delta: Callable[[Array, Array, Array, int, Array], bool | None]
    pulls: Literal["after", "before"] = "after"
    adopt: Callable[[Array, Array, Array, Array], None] = _adopt_center
    weight: Weight = _full
    accumulates: bool = False
    allreduce: bool = False
    alpha: float = 0.0
    buffers: int = 0

    def form_commit(self, x: Array, o: Array, a: Array, k: int, out: Array) -> bool:
        """Write the commit, its buffers included, into `out`; whether all of it is finite. Arguments as of `delta`."""
        if not self.buffers:
            finite = self.delta(x, o, a, k, out)
        else:
            p, b = self.split(x)
            finite = self.delta(x[p], o[p], a[p], k, out[p])
            out[b] = x[b]
            finite = finite and all_finite(out[b])
        return all_finite(out) if finite is None else finite

    def adopt_pull(self, x: Array, sent: Array, delta: Array, c: Array) -> None:
        """Adopt `c`, its buffers included; arguments as of `adopt`. A rule that pulls before keeps its own buffers."""
        if not self.buffers:
            self.adopt(x, sent, delta, c)
            return
        p, b = self.split(x)
        moved = x[p]
        self.adopt(moved, moved if sent is x else sent[p], delta[p], c[p])
        if self.pulls == "after":
            x[b] = c[b]

    def split(self, x: Array) -> tuple[slice, slice]:
        """Where the parameters and where the buffers lie in `x` (n,), or in a center's block at the end of it."""
        at = x.size - self.buffers
        return slice(0, at), slice(at, x.size)

    def of_block(self, block: slice, size: int) -> "Rule":
        """The rule for `block` of the vectors, whose size is `size`: with the buffers that lie in it."""
        return self._replace(buffers=max(0, block.stop - max(block.start, size - self.buffers)))

    def divisor(self, k: int) -> int | None:
        """What x − o is divided by, where the commit is no more than that, and the pull is adopted without it."""
        if self.buffers or self.adopt is not _adopt_center:
            return None
        return k if self.delta is _mean_displacement else 1 if self.delta is _displacement else None

    @property
    def weighs(self) -> bool:
        """Whether commits have weights other than 1."""
        return self.weight is not _full


def _displacement(x: Array, o: Array, _a: Array, _k: int, out: Array) -> bool | None:
    return run("delta", [x, o], [1], [out])


def _mean_displacement(x: Array, o: Array, _a: Array, k: int, out: Array) -> bool | None:
    return run("delta", [x, o], [k], [out])


def _mean_gradient(_x: Array, _o: Array, a: Array, k: int, out: Array) -> None:
    np.divide(a, -k, out=out)


def agn(variant: str = "displacement") -> Rule:
    """Accumulated Gradient Normalization: commit (x − o)/k, c ← c + commit, then x ← c.

    With constant-rate SGD x − o = Σ −η∇L, so this is the paper's a/λ; with any other local optimizer the accumulator is
    the displacement, as in the authors' code. k = λ, or fewer steps in the last period. A round of n commits moves
    c by n/λ mean displacements: keep n/λ at 2 or below, or use `outer_rate`.

    Args:
        variant: "displacement" (default), or "gradient": commit −a/k with a = Σ∇L, a pseudo-gradient for an optimizer
            at the center, of the same kind as the local one unless another is given.

    Returns:
        The rule.

    Raises:
        ValueError: For another variant.

    Source: Hermans, Spanakis, Moeckel 2017, arXiv:1710.02368, algorithm 1; the gradient variant is what TensorFlow
    1.14's `tf.contrib.opt.AGNOptimizer` did.

    >>> x, o, delta = np.array([4.0]), np.array([1.0]), np.empty(1)
    >>> finite = agn().delta(x, o, x, 10, delta)
    >>> delta
    array([0.3])
    """
    if variant == "displacement":
        return Rule("agn", _mean_displacement)
    if variant == "gradient":
        return Rule("agn", _mean_gradient, accumulates=True)
    raise ValueError(f"variant must be 'displacement' or 'gradient', not {variant!r}")


def downpour() -> Rule:
    """DOWNPOUR: commit x − o, c ← c + commit, then x ← c.

    The displacements of all workers are summed: stable while rate · λ · n is small. AGN with λ = 1 is the same.

    Returns:
        The rule.

    Source: Dean et al. 2012 ("Large Scale Distributed Deep Networks"), in the form that commits displacements.
    """
    return Rule("downpour", _displacement)


def _by_staleness(commit: CommitInfo) -> float:
    return 1 / (commit.staleness + 1)


def dynsgd() -> Rule:
    """DynSGD: commit x − o, c ← c + commit/(s + 1), then x ← c.

    Returns:
        The rule.

    Source: Jiang, Cui, Zhang, Yu 2017 ("Heterogeneity-aware Distributed Parameter Servers"), the weight by staleness.

    >>> dynsgd().weight(CommitInfo(staleness=3))
    0.25
    """
    return Rule("dynsgd", _displacement, weight=_by_staleness)


def _elastic(name: str, alpha: float) -> Rule:
    if not 0 < alpha <= 1:
        raise ValueError(f"{name}: α = ηρ must lie in (0, 1], not {alpha!r}; lower rho or the rate")

    def delta(x: Array, o: Array, _a: Array, _k: int, out: Array) -> bool | None:
        return run("elastic", [x, o], [alpha], [out])

    return Rule(name, delta, pulls="before", adopt=_adopt_elastic, alpha=alpha)


def aeasgd(alpha: float) -> Rule:
    """Asynchronous elastic averaging: pull c, d = α(x − c), x ← x − d, c ← c + d.

    Each worker keeps its own parameters; an exchange conserves x + c.

    Args:
        alpha: α = ηρ, the fraction of their distance that x and c move in an exchange; in (0, 1].

    Returns:
        The rule.

    Raises:
        ValueError: For an α outside of (0, 1].

    Source: Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 1; the local optimizer is SGD there.

    >>> rule, x, c, delta = aeasgd(0.25), np.array([4.0]), np.array([0.0]), np.empty(1)
    >>> finite = rule.delta(x, c, x, 10, delta)
    >>> rule.adopt(x, x, delta, c)
    >>> x, delta
    (array([3.]), array([1.]))
    """
    return _elastic("aeasgd", alpha)


def eamsgd(alpha: float) -> Rule:
    """AEASGD for workers with Nesterov momentum: the exchange is that of `aeasgd`; the local optimizer is Nesterov's.

    Args:
        alpha: α = ηρ in (0, 1], as of `aeasgd`.

    Returns:
        The rule; give it `nesterov` as optimizer (the command line does).

    Raises:
        ValueError: For an α outside of (0, 1].

    Source: Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 2. There v ← δv − η∇L(x + δv), x ← x + v; our
    `nesterov` follows the same trajectory in x + δv, so between two exchanges the two agree.
    """
    return _elastic("eamsgd", alpha)


def _mean(commit: CommitInfo) -> float:
    return 1 / commit.commits


def synchronous() -> Rule:
    """Synchronous: c ← c + the mean of x − o over all ranks, then x ← c.

    λ = 1 is data-parallel SGD, a longer period is local SGD. All ranks train, none serves.

    Returns:
        The rule.

    Source: Stich 2019, arXiv:1805.09767 (local SGD).

    >>> synchronous().weight(CommitInfo(staleness=0, commits=4))
    0.25
    """
    return Rule("synchronous", _displacement, weight=_mean, allreduce=True)


def diloco() -> Rule:
    """DiLoCo-like: minus the mean of x − o over all ranks is the gradient of an optimizer at the center, then x ← c.

    Returns:
        The rule; give it `adamw` as optimizer and `nesterov(0.7, 0.9)` as center optimizer (the command line does).

    Source: Douillard et al. 2023, arXiv:2311.08105; there λ is some 500.
    """
    return Rule("diloco", _displacement, weight=_mean, allreduce=True)


RULES: dict[str, Callable[..., Rule]] = {
    f.__name__: f for f in (agn, downpour, dynsgd, aeasgd, eamsgd, synchronous, diloco)
}


def outer_rate(r: float) -> Weight:
    """Weight rk/n of AGN's commits (x − o)/k: c ← c + (r/n)(x − o).

    k is the commit's own number of steps, so that λ may differ between workers, and a shorter last period counts
    less.

    Args:
        r: Effective outer rate of a round of n commits, whatever n and λ are; positive. r = 1 averages the
            displacements, r = n/λ is AGN itself, r = n DOWNPOUR.

    Returns:
        The weight, for `weighted`.

    Raises:
        ValueError: For an r that is not positive and finite.

    Source: ours; as the outer rate of local SGD (Reddi et al. 2021, arXiv:2003.00295).

    >>> outer_rate(2.0)(CommitInfo(staleness=3, steps=10, workers=40))
    0.5
    """
    if not (r > 0 and isfinite(r)):
        raise ValueError(f"the outer rate r must be a positive number, not {r!r}")

    def weight(commit: CommitInfo) -> float:
        return r * commit.steps / commit.workers

    return weight


def staleness_power(a: float) -> Weight:
    """Weight min(1, ((1 + E[s])/(1 + s))^a), E[s] = n − 1: commits of ordinary staleness keep weight 1.

    Args:
        a: The power, at least 0; 0 is AGN, 1 halves a commit of twice the ordinary staleness.

    Returns:
        The weight, for `weighted`.

    Raises:
        ValueError: For an a that is negative or not finite.

    Source: (1 + s)^−a of Xie, Koyejo, Gupta 2019, arXiv:1903.03934; relative to the mean staleness of n equal workers,
    which is ours.

    >>> weight = staleness_power(0.5)
    >>> weight(CommitInfo(staleness=2, workers=4)), weight(CommitInfo(staleness=15, workers=4))
    (1.0, 0.5)
    """
    if not (a >= 0 and isfinite(a)):
        raise ValueError(f"the power a of the staleness weight must not be negative, but is {a!r}")

    def weight(commit: CommitInfo) -> float:
        return min(1.0, float((commit.workers / (1 + commit.staleness)) ** a))

    return weight


def staleness_cap(cap: int) -> Weight:
    """Weight 1 up to staleness `cap`, 0 above: a staler commit is dropped, and its worker pulls again.

    The steps of a dropped commit are free again.

    Args:
        cap: Largest staleness that counts, in commits, at least 0; equal workers have n − 1.

    Returns:
        The weight, for `weighted`.

    Raises:
        ValueError: For a negative cap.

    Source: bounded staleness, here at the center (Ho et al. 2013 let the workers wait instead).

    >>> [staleness_cap(4)(CommitInfo(staleness)) for staleness in (0, 4, 5)]
    [1.0, 1.0, 0.0]
    """
    if cap < 0:
        raise ValueError(f"the cap on the staleness must not be negative, but is {cap!r}")

    def weight(commit: CommitInfo) -> float:
        return float(commit.staleness <= cap)

    return weight


def by_samples(r: float, period: int) -> Weight:
    """Weight rλ(s + 1)p/n of AGN's commits (x − o)/k: each worker counts by its samples, however often it commits.

    For workers with data of their own. A worker's share of the commits is 1/(s + 1) in the mean, since it pulls after
    each of its own; so its displacements count r·p/n a round, whatever its speed, and the center comes to rest where
    the loss over all samples is least, not where the fastest worker's is. At most k·max(1, r): c does not go beyond x.

    Args:
        r: Effective outer rate of a round of n commits, as of `outer_rate`; positive.
        period: λ.

    Returns:
        The weight, for `weighted`.

    Raises:
        ValueError: For an r that is not positive and finite.

    Source: ours; inverse propensity weights (Horvitz, Thompson 1952), by commits instead of samples.

    >>> weight = by_samples(1.0, period=10)  # two workers with as many samples; one commits three times as often
    >>> [weight(CommitInfo(staleness, steps=10, workers=2, share=0.5)) for staleness in (3, 0, 0, 1)]
    [10.0, 2.5, 2.5, 5.0]
    """
    outer_rate(r)  # refuses what is no rate

    def weight(commit: CommitInfo) -> float:
        w = r * period * (commit.staleness + 1) * commit.share / commit.workers
        return min(w, commit.steps * max(1.0, r))

    return weight


def weighted(rule: Rule, *weights: Weight) -> Rule:
    """`rule` with its weight multiplied by `weights`.

    Args:
        rule: agn, downpour or dynsgd, or one of your own that pulls after it commits.
        *weights: Functions of a `CommitInfo`, such as `outer_rate(1.0)`.

    Returns:
        A rule of the same name; `rule` itself without any weights.

    Raises:
        ValueError: For an elastic rule, which subtracts from x what it adds to c, and for one that uses Allreduce.

    >>> weighted(agn(), outer_rate(1.0), staleness_cap(8)).weight(CommitInfo(9, steps=10, workers=4))
    0.0
    """
    if not weights:
        return rule
    if rule.pulls == "before" or rule.allreduce:
        raise ValueError(f"rule {rule.name} takes no further weights; only agn, downpour and dynsgd do")
    factors = (rule.weight, *weights)

    def weight(commit: CommitInfo) -> float:
        return prod(factor(commit) for factor in factors)

    return rule._replace(weight=weight)


def center_step(
    c: Array,
    delta: Array,
    weight: float,
    optimizer: Optimizer | None,
    state: Any,
    steps: int = 0,
    on_block: Callable[[int], None] | None = None,
    encoding: int = 0,
    buffers: tuple[Array, float] | None = None,
) -> Any:
    """Move the center in place: c ← c + weight·delta, or one step of `optimizer` on −weight·delta.

    `c`: (n,); `delta`: (n,) or, with `encoding`, its bytes; not changed; `steps`: local steps in all earlier commits,
    the position of the center's rate schedule; `on_block`: called after each block with its end: c is final up to
    there; `buffers`: b and w, for the buffers at the end of c, which `mix` moves instead. Returns the new state of the
    optimizer.
    """
    if encoding:
        return _decoded_step(c, delta, get(NAMES[encoding]), weight, optimizer, state, steps, on_block)
    stop = c.size - (buffers[0].size if buffers else 0)
    ranges = [(0, stop)] if buffers else None
    if optimizer is not None:
        state = optimizer.update(delta, state, c, scale=-weight, step=steps, ranges=ranges, on_block=on_block)
    else:
        run("add", [delta], [weight], [c], ranges, on_block)
    if buffers:
        mix(c[stop:], *buffers)
        if on_block:
            on_block(c.size)
    return state


def mix(c: Array, b: Array, weight: float) -> None:
    """c ← c + weight·(b − c), in place, for a weight in [0, 1]: c stays between c and b, number by number."""
    if weight == 1:  # rounded, c + (b − c) may lie beyond b
        c[...] = b
    else:
        c += c.dtype.type(weight) * (b - c)


def _decoded_step(
    c: Array, data: Array, encoding: Encoding, weight: float, optimizer: Optimizer | None, state: Any, steps: int,
    on_block: Callable[[int], None] | None,
) -> Any:  # fmt: skip
    """As `center_step`, with encoded `data`: decoded and added in one pass."""
    # One commit at a time, though several may wait: added block by block while the block of c is in the cache, four of
    # them took 0.9 to 1.4 times as long as one after the other, as the arithmetic and the deltas' own bytes remain.
    if optimizer is not None:
        encoding.decode(data, delta := empty_like(c))
        return center_step(c, delta, weight, optimizer, state, steps, on_block)
    encoding.decode_add(data, c, weight, on_block)
    return state
