"""What is compared: rules and centers, and workers whose speeds differ."""

from typing import NamedTuple

from quorum import QuorumConfig

from agnmpi.simulation.timing import Timing
from agnmpi.training.config import Config

WORKERS, PERIOD = 16, 10
STEP_TIME = 0.01  # seconds, of a worker whose factor is 1
TARGETS = 0.9, 0.95  # validation accuracies; the times to reach them are compared
_N, _R1 = WORKERS, {"outer_rate": 1.0}
# Adam at the workers, rate 0.001 (DiLoCo: AdamW); nothing is tuned for any of them. The default has its own, 0.008
# after a warmup, which `synchronous` is given, too.
SPEEDS = {
    "synchronous, λ = 1": {"rule": "synchronous", "period": 1},
    "synchronous, λ = 10": {"rule": "synchronous"},
    "synchronous, λ = 10, rate 0.008": {"rule": "synchronous", "rate": 0.008, "warmup": 32 * _N},
    "DiLoCo": {"rule": "diloco", "optimizer": "adamw"},
    "AGN": {"outer_rate": "published"},
    "r = 1": _R1,
    "r = 1, R = n": _R1 | {"staleness_cap": _N},
    "r = 1, R = 2n": _R1 | {"staleness_cap": 2 * _N},
    "r = 1, R = 4n": _R1 | {"staleness_cap": 4 * _N},
    "r = 1, DyLU": _R1 | {"dylu": True},
    "default": {"rate": None},
    "default, R = n": {"rate": None, "staleness_cap": _N},
    "default, R = 2n": {"rate": None, "staleness_cap": 2 * _N},
    "default, R = 4n": {"rate": None, "staleness_cap": 4 * _N},
    "default, DyLU": {"rate": None, "dylu": True},
}
# Each at the same rates of Adam, with the warmup of the default. K commits, then one step of rate η = K/n on their
# mean: a round of n moves the center by one, as with r = 1; or with the center of DiLoCo, as in Decoupled DiLoCo.
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
TUNED = {"r = 1": _R1, "DiLoCo": SPEEDS["DiLoCo"]} | {
    f"K = {k}{', apart' if apart else ''}": {"commits": k, "quorum_rate": k / _N, "apart": apart}
    for k in (4, 8, 16)
    for apart in (False, True)
}
TUNED["K = 16, Nesterov, apart"] = {"commits": 16, "quorum_rate": 0.7, "beta": 0.9, "apart": True}
QUORUMS = {
    f"{name}, rate {rate:g}": numbers | {"rate": rate, "warmup": 32 * _N}
    for name, numbers in TUNED.items()
    for rate in RATES
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
    """All runs, seed by seed; the quorum in the first scene alone, with one seed, and with three those that may win."""
    mine = [Cell(name, scene, seed) for seed in range(SIZE.seeds) for scene in SCENES for name in SPEEDS]
    first = next(iter(SCENES))
    mine += [Cell(name, first, 0) for name in QUORUMS]
    plain = [f"{name}, rate 0.016" for name in ("r = 1", "K = 4", "K = 8", "K = 16")]
    return mine + [Cell(name, first, seed) for seed in (1, 2) for name in plain]


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
