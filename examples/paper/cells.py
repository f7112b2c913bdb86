"""What the experiment runs: rules and centers, numbers of workers and periods, and what was published about them."""

from typing import NamedTuple

# Every rule with Adam at the workers. As in the authors' code the rate 0.01 of AEASGD is that of its elastic force:
# α = 0.01·5; here α = rate·rho with Adam's rate of 0.001.
AEASGD = {"rule": "aeasgd", "rho": 50.0}
PUBLISHED_AGN = {"outer_rate": "published"}
METHODS = {
    "alone": {},  # one worker with λ = 1: Adam itself
    "AGN": PUBLISHED_AGN,
    "AEASGD": AEASGD,
    "DOWNPOUR": {"rule": "downpour"},
    "DynSGD": {"rule": "dynsgd"},
    "AGN r=1": {"outer_rate": 1.0},
    "AGN r=2": {"outer_rate": 2.0},
    "AGN stale": {"staleness_power": 2.0} | PUBLISHED_AGN,
    "AGN r=1 momentum": None,  # recorded with 0.4.0; examples/delayed_nesterov.py is what it was
    "AGN DyLU": {"dylu": True} | PUBLISHED_AGN,
    "AGN r=1 DyLU": {"dylu": True, "outer_rate": 1.0},
}
# Virtual time: steps of 10 ms ± 30 %, workers that start within a period of 10 steps, and a center with little to do.
_TIME = {"step_time": 0.01, "step_distribution": "normal", "step_spread": 0.3, "start_jitter": 0.1}
SCENES = {
    "equal": _TIME,
    # The published server was saturated: here it can serve 200 commits a second, half of what 40 workers want.
    "saturated": _TIME | {"service": 0.005},
    "busy center": _TIME | {"service": 0.01},  # likewise with n = 20, λ = 10, and with n = 40, λ = 20
    # The published workers were started by a scheduler: here over a quarter of the quick run of n = 20.
    "spread starts": _TIME | {"start_jitter": 0.5},
    "stragglers": _TIME | {"stragglers": 0.2, "straggler_factor": 4.0},  # one worker in five is four times as slow
}


class Size(NamedTuple):
    """How large the experiment is."""

    widths: list[int]  # of the hidden layers
    epochs: float  # over all workers together
    seeds: int
    evaluate_every: float  # epochs


class Cell(NamedTuple):
    """A run; `seed` is that of the parameters, the order of samples and the times."""

    method: str
    workers: int
    period: int
    seed: int = 0
    scene: str = "equal"


QUICK, LONG = Size([200, 200], 8.0, 3, 1.0), Size([200, 200], 40.0, 1, 2.0)
FULL = Size([1000, 2000, 1000], 40.0, 1, 1.0)
LARGE = FULL._replace(epochs=10.0, seeds=3)
PAPER, PAIRS = ("AGN", "AEASGD", "DOWNPOUR"), [(4, 10), (10, 10), (20, 20), (40, 10), (40, 40)]


def quick() -> list[Cell]:
    """The quick subset, seed by seed: the paper's rules, our own centers, and further scenes."""
    runs = [("alone", 1, 1)]
    runs += [(method, n, period) for n, period in PAIRS for method in PAPER]
    # With n = λ an outer rate of 1 is AGN itself.
    runs += [("AGN r=1", n, period) for n, period in ((4, 10), (40, 10))]
    runs += [("AGN r=2", n, period) for n, period in PAIRS]
    # n/λ = 2, the edge of what was published as stable.
    runs += [(method, n, period) for n, period in ((20, 10), (40, 20)) for method in ("AGN", "AEASGD", "AGN r=1")]
    runs += [("AGN stale", n, period) for n, period in ((4, 10), (40, 10))]
    scenes = [("AGN", 40, 10, "saturated"), ("AGN r=1", 40, 10, "saturated")]
    scenes += [(method, 10, 10, "stragglers") for method in ("AGN", "AGN DyLU")]
    scenes += [("AGN", n, n // 2, scene) for scene in ("busy center", "spread starts") for n in (20, 40)]
    return [
        cell
        for seed in range(QUICK.seeds)
        for cell in (*(Cell(*run, seed) for run in runs), *(Cell(*run, seed, scene) for *run, scene in scenes))
    ]


def long() -> list[Cell]:
    """The published number of epochs with the small MLP, where n/λ is 1 or more: is it a matter of the start?"""
    runs = [(method, n, period) for n, period in ((40, 20), (20, 10), (40, 10)) for method in ("AGN", "AGN r=1")]
    runs += [("AGN", 40, 40), ("AEASGD", 40, 40), ("AEASGD", 40, 10), ("alone", 1, 1)]
    return [Cell(*run, seed) for run in runs for seed in range(LONG.seeds)]


GRID = [(n, period) for n in range(10, 41, 5) for period in range(10, 41, 5)]  # as published


def large() -> list[Cell]:
    """The published cells for AGN and AEASGD where n/λ is 1, 2 or 4, seed by seed: first the edge, n/λ = 2."""
    pairs = sorted((pair for pair in GRID if pair[0] / pair[1] in (1, 2, 4)), key=lambda pair: pair[0] == pair[1])
    runs = [("alone", 1, 1), *((method, n, period) for n, period in pairs for method in ("AGN", "AEASGD"))]
    return [Cell(*run, seed) for seed in range(LARGE.seeds) for run in runs]


def full() -> list[Cell]:
    """The published 49 cells for AGN and AEASGD, DOWNPOUR where it says something, and the outer rate."""
    runs = [("alone", 1, 1)]
    runs += [(method, n, period) for n, period in GRID for method in ("AGN", "AEASGD")]
    runs += [("DOWNPOUR", 10, 1), *(("DOWNPOUR", n, 10) for n in (10, 20, 40))]
    runs += [("AGN r=1", n, period) for n, period in GRID if n != period]
    return [Cell(*run, seed) for run in runs for seed in range(FULL.seeds)]


# Validation accuracy in %, as arXiv:1710.02368 has it: single runs, 40 epochs, the large MLP.
PUBLISHED = {
    ("AGN", 10, 10): 98.43, ("AGN", 20, 20): 98.47, ("AGN", 40, 20): 98.40, ("AGN", 40, 10): 95.55,
    ("AGN", 40, 40): 98.18, ("AEASGD", 10, 10): 98.64, ("AEASGD", 20, 20): 98.39, ("AEASGD", 40, 20): 97.83,
    ("AEASGD", 40, 10): 97.99, ("AEASGD", 40, 40): 97.45,
}  # fmt: skip
DIVERGED = {("DOWNPOUR", 10, 10), ("DOWNPOUR", 20, 20), ("DOWNPOUR", 40, 10), ("DOWNPOUR", 40, 40)}
