"""A center that waits for K commits and makes one step on their mean: the quorum of FedBuff and Decoupled DiLoCo."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agnmpi import Optimizer
from agnmpi.core.rules import CommitInfo, Rule, downpour
from agnmpi.training.config import Config
from agnmpi.training.options import option


class QuorumState(NamedTuple):
    step: int  # commits
    momentum: np.ndarray  # (n,) m
    total: np.ndarray  # (n,) u of those that wait, each with its weight
    sums: np.ndarray  # (2,) of their weights, and of their weighted norms


def quorum(commits=1, apart=False, rate=1.0, beta=0.0):
    """Collect K gradients g with weights w and take their mean d; then m ← βm + d, x ← x − η(d + βm), and begin anew.

    The mean is Σwg/Σw, or, with direction and length apart, (Σw‖g‖/Σw)·u/‖u‖ with u = Σwg/‖g‖: the mean of K nearly
    orthogonal vectors is √K times shorter than they are, this one is not. A zero g has no direction, and counts in
    the mean of the lengths alone.

    Args:
        commits: K, at least 1 (default 1).
        apart: Whether the mean is of direction and length apart (default False).
        rate: η, positive (default 1.0): n workers whose commits are displacements move x by ηn/K of them in a round.
        beta: β of Nesterov's momentum, in [0, 1) (default 0: none).

    Returns:
        An Optimizer with the slots `momentum`, `total` and `sums`; w is its argument `scale`, whatever the sign.

    Raises:
        ValueError: Unless K ≥ 1, η > 0 and 0 ≤ β < 1.

    Source: Nguyen et al. 2021, arXiv:2106.06639, without its staleness weight; direction and length apart, weights by
    steps and momentum: Decoupled DiLoCo, arXiv:2604.21428. Its grace time, for which the center waits after the K-th
    commit, is left out: an optimizer has no clock.
    """
    if not (commits >= 1 and rate > 0 and 0 <= beta < 1):
        raise ValueError(f"commits >= 1, rate > 0 and 0 <= beta < 1 are needed, not {commits!r}, {rate!r}, {beta!r}")

    def init(x):
        return QuorumState(0, x * 0, x * 0, np.zeros(2))

    def update(g, state, x, *, step=None, scale=1.0, ranges=None, on_block=None):  # noqa: ARG001
        _, momentum, total, sums = state
        count = state.step + 1
        parts = [slice(*part) for part in ranges or [(0, x.size)]]
        length = _norm(g, parts)
        sums += abs(scale), abs(scale) * length
        for part in parts:
            total[part] += scale / ((length or 1.0) if apart else 1.0) * g[part]
        if count % commits == 0:
            factor = float(sums[1] / sums[0] / (_norm(total, parts) or 1.0) if apart else 1 / sums[0])
            for part in parts:
                d = factor * total[part]
                momentum[part] *= beta
                momentum[part] += d
                x[part] -= rate * (d + beta * momentum[part])
                total[part] = 0
            sums[:] = 0
        if on_block:
            on_block(parts[-1].stop)
        return state._replace(step=count)

    numbers = f"commits {commits}, apart {apart}, rate {rate:g}, beta {beta:g}"
    return Optimizer("quorum", init, update, numbers)


def _norm(x, parts):
    return float(np.sqrt(sum(float(x[part] @ x[part]) for part in parts)))


def _steps(commit: CommitInfo) -> float:
    return float(commit.steps)


@dataclass(frozen=True)
class QuorumConfig(Config):
    """A run whose workers commit x − o, weighted by its steps, to a center with `quorum`."""

    commits: int = option(1, "rule", "K", int, least=1)
    apart: bool = option(False, "rule", "direction and length apart", bool)
    quorum_rate: float = option(1.0, "rule", "η", float, positive=True)
    beta: float = option(0.0, "rule", "β", float, least=0)

    def make_rule(self) -> Rule:
        return downpour()._replace(name="quorum", weight=_steps)

    def make_center_optimizer(self, steps: int) -> Optimizer:
        return quorum(self.commits, self.apart, self.quorum_rate, self.beta)
