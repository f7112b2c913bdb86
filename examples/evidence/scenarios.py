"""What is compared: rules and centers, and workers whose speeds differ."""

from typing import NamedTuple

from quorum import QuorumConfig

from agnmpi.simulation.timing import Timing
from agnmpi.training.config import Config

WORKERS, PERIOD = 16, 10
STEP_TIME = 0.01  # seconds, of a worker whose factor is 1
TARGET = 0.9  # validation accuracy; the time to reach it is compared
_N, _R1 = WORKERS, {"outer_rate": 1.0}
# Adam at the workers, rate 0.001 (DiLoCo: AdamW); nothing is tuned for any of them. The default has its own rate.
SPEEDS = {
    "synchronous, λ = 1": {"rule": "synchronous", "period": 1},
    "synchronous, λ = 10": {"rule": "synchronous"},
    "DiLoCo": {"rule": "diloco", "optimizer": "adamw"},
    "AGN": {"outer_rate": "published"},
    "r = 1": _R1,
    "r = 1, R = n": _R1 | {"staleness_cap": _N},
    "r = 1, R = 2n": _R1 | {"staleness_cap": 2 * _N},
    "r = 1, R = 4n": _R1 | {"staleness_cap": 4 * _N},
    "r = 1, DyLU": _R1 | {"dylu": True},
    "default": {"rate": None},
}
# K commits, then one step of rate η: η = 1 as published; η = K/n is r = 1, a round then moves the center as much.
_QUORUMS = [(1, 1.0), (4, 1.0), (4, 0.25), (8, 1.0), (8, 0.5), (16, 1.0)]
QUORUMS = {
    f"K = {k}, η = {rate:g}{', apart' if apart else ''}": {"commits": k, "quorum_rate": rate, "apart": apart}
    for k, rate in _QUORUMS
    for apart in (False, True)
    if k > 1 or not apart  # one vector is its own direction and length
}
QUORUMS |= {  # with the center of DiLoCo, as in Decoupled DiLoCo
    f"K = {k}, Nesterov, apart": {"commits": k, "quorum_rate": 0.7, "beta": 0.9, "apart": True} for k in (8, 16)
}
METHODS = SPEEDS | QUORUMS
SCENES = {
    # Three or four workers at each of these factors on the step time.
    "1 to 16 times": {"speed_factors": "1,2,4,8,16", "step_distribution": "normal", "step_spread": 0.1},
    # Each step has an exponential time, and one worker is 4 times as slow.
    "stalls": {
        "step_distribution": "exponential", "step_spread": 1.0, "stragglers": 1 / WORKERS, "straggler_factor": 4.0,
    },
}  # fmt: skip


class Size(NamedTuple):
    """How large the experiment is."""

    widths: list[int]  # of the hidden layers
    batch: int
    epochs: float  # over all workers together
    seeds: int
    evaluate_every: float  # epochs


class Cell(NamedTuple):
    """A run; `seed` is that of the parameters, the order of samples and the times."""

    method: str
    scene: str
    seed: int = 0


SIZE = Size([64], 16, 2.0, 5, 0.2)


def cells() -> list[Cell]:
    """All runs: first without the quorum, seed by seed."""
    parts = SPEEDS, QUORUMS
    return [
        Cell(name, scene, seed) for part in parts for seed in range(SIZE.seeds) for scene in SCENES for name in part
    ]


def timing(cell: Cell) -> Timing:
    """The times of a cell."""
    return Timing(step_time=STEP_TIME, start_jitter=0.1, time_seed=cell.seed, **SCENES[cell.scene])


def config(cell: Cell, size: Size, data: str) -> Config:
    """The configuration of a cell, without its directory; `data`: directory of MNIST's IDX files."""
    numbers = METHODS[cell.method]
    return (QuorumConfig if "commits" in numbers else Config)(
        **{
            "problem": "mnist_mlp:Mnist",
            "options": {"path": data, "widths": size.widths},
            "transport": "local",
            "workers": WORKERS,
            "period": PERIOD,
            "optimizer": "adam",
            "rate": 0.001,
            "batch": size.batch,
            "epochs": size.epochs,
            "evaluate_every": size.evaluate_every,
            "seed": cell.seed,
            "device": "cpu",
            **numbers,
        }
    )


def fastest(cell: Cell, size: Size) -> float:
    """Samples per virtual second of all workers together, if none ever waits."""
    return float(sum(size.batch / STEP_TIME / timing(cell).factors(WORKERS)))
