"""Recognised data and models: a CNN on Fashion-MNIST, a GPT on Shakespeare's characters; asynchronous, in virtual time.

python examples/evidence/benchmarks.py --shakespeare FILE     (pip install '.[torch]', and '.[paper]' for the pictures)

Finished cells are kept in OUT/benchmarks.jsonl and skipped when it is started again; tables and pictures are made at
the end, or with --report alone. --check repeats three finished cells, drawn at random, and compares all their numbers.
An experiment whose data is not there is left out.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "paper"))

from resumable import check, finish, load, simulated

ONE, DEFAULT = "one process", "default"
DIVIDED = "batch divided, int8"  # by n; of Adam the rate grows with the root of what divides the batch
OPTIMISTIC = "batch divided, optimistic, λ = 1"
STEP = {"step_distribution": "normal", "step_spread": 0.3}
LINKS = {"1 Gbit/s": 125e6, "50 Mbit/s": 6.25e6, "": 0.0}  # bytes a second, each way; "": messages take no time
LATENCY = 1e-3


class Experiment(NamedTuple):
    """Rules on one problem at equal samples."""

    problem: str
    data: str  # where it is by default
    metric: str
    parameters: int
    workers: int
    common: dict  # of the configuration
    timing: dict  # of a step with the batch of `common`; it is in proportion to that
    methods: dict[str, dict]  # what differs in the configuration
    variants: dict[str, dict] = {}  # the same, of runs that say why: with one seed, and in no picture
    options: dict = {}  # of the problem

    def numbers(self, method: str) -> dict:
        """The configuration of a method or a variant."""
        return {"workers": self.workers, "period": 10} | self.common | (self.methods | self.variants)[method]

    def step_time(self, method: str) -> float:
        """Seconds of a step, in proportion to its batch."""
        return self.timing["step_time"] * self.numbers(method)["batch"] / self.common["batch"]


_SMALL = {"optimizer": "adam", "batch": 64, "epochs": 10.0, "evaluate_every": 1.0, "schedule": "cosine"}
_GPT = {
    "optimizer": "adamw", "optimizer_options": {"beta2": 0.99}, "weight_decay": 0.1, "clip": 1.0, "batch": 12,
    "steps": 2000, "schedule": "cosine", "evaluate_every": 250 * 12 / 1_003_790,
}  # fmt: skip
_INT8 = {"encoding": "int8", "pull_encoding": "int8"}
_OPTIMISTIC = {"period": 1, "outer_rate": 1.0, "center_optimizer": "optimistic"}
_FREQUENT = {
    "batch": 3, "steps": 8000, "period": 1, "outer_rate": 1.0, "rate": 0.002, "warmup": 400, "centers": 4,
    "encoding": "int4", "pull_encoding": "int8",
}  # fmt: skip
_PLAIN = _FREQUENT | {"centers": 1, "encoding": "float32", "pull_encoding": "float32"}
_OTHER_RULE = _PLAIN | {"outer_rate": None}
EXPERIMENTS = {
    "Fashion-MNIST": Experiment(
        "fashion:FashionCNN",
        "/usr/share/datasets/fashion-mnist",
        "accuracy",
        86_282,
        8,
        _SMALL,
        {"step_time": 0.02, "start_jitter": 0.2},
        {
            ONE: {"workers": 1, "rate": 0.004, "warmup": 300},
            DEFAULT: {},
            DIVIDED: {"batch": 8, "outer_rate": 1.0, "rate": 0.006, "warmup": 2000, **_INT8},
            OPTIMISTIC: {"batch": 8, "rate": 0.011, "warmup": 2400, **_OPTIMISTIC},
            "synchronous, λ = 1": {"rule": "synchronous", "period": 1, "rate": 0.008, "warmup": 256},
            "DiLoCo": {"rule": "diloco", "optimizer": "adamw", "rate": 0.001},
            "AEASGD": {"rule": "aeasgd", "rate": 0.001, "rho": 100.0},  # α = 0.1
            "AGN as published": {"outer_rate": "published", "rate": 0.001},
        },
        {
            "one process, without a warmup": {"workers": 1, "rate": 0.004},
            "batch 16, optimistic, λ = 1": {"batch": 16, "rate": 0.011, "warmup": 1200, **_OPTIMISTIC},
        },
    ),
    "Shakespeare": Experiment(
        "shakespeare:Shakespeare",
        "input.txt",
        "loss",
        805_248,
        4,
        _GPT,
        {"step_time": 0.1, "start_jitter": 1.0},
        {
            ONE: {"workers": 1, "rate": 0.001, "warmup": 100},
            DIVIDED: {"batch": 3, "steps": 8000, "outer_rate": 1.0, "rate": 0.002, "warmup": 400, **_INT8},
            OPTIMISTIC: _FREQUENT | _OPTIMISTIC,
            "batch divided, λ = 1": _FREQUENT,
            DEFAULT: {},
            "DiLoCo": {"rule": "diloco", "period": 25, "rate": 0.001, "warmup": 100},
        },
        {
            "optimistic, float32, one center": _PLAIN | _OPTIMISTIC,
            "optimistic, int4 both ways": _FREQUENT | _OPTIMISTIC | {"pull_encoding": "int4"},
            "synchronous, batch 3, λ = 1": _OTHER_RULE | {"rule": "synchronous"},
            "synchronous, batch 3, λ = 10": _OTHER_RULE | {"rule": "synchronous", "period": 10},
            "AEASGD, batch 3, λ = 1": _OTHER_RULE | {"rule": "aeasgd", "rho": 125.0},  # α = 0.25
        },
    ),
}


class Cell(NamedTuple):
    """A run; `seed` is that of the parameters, the order of samples and the times."""

    experiment: str
    method: str
    link: str
    seed: int


def cells(found: list[str]) -> list[Cell]:
    """All runs of the experiments `found`: first those that decide."""
    fashion, shakespeare = EXPERIMENTS.values()
    mine = [Cell("Fashion-MNIST", method, "", seed) for seed in range(5) for method in fashion.methods]
    for seed in range(3):
        for method in shakespeare.methods:
            mine.append(Cell("Shakespeare", method, "" if method == ONE else "50 Mbit/s", seed))
    mine += [Cell("Shakespeare", method, "1 Gbit/s", 0) for method in (OPTIMISTIC, DEFAULT)]
    mine += [Cell("Fashion-MNIST", method, "", 0) for method in fashion.variants]
    mine += [Cell("Shakespeare", method, "50 Mbit/s", 0) for method in shakespeare.variants]
    return [cell for cell in mine if cell.experiment in found]


def travel(rate: float, centers: int) -> dict:
    """Times of messages over links of `rate` bytes a second; several centers are on the hosts of the workers.

    What a center's link brings in and takes out is its service. A center on the host of a worker has half of the link.
    """
    service = rate if centers > 1 else 2 * rate
    return {"bandwidth": rate, "service_bandwidth": service, "latency": LATENCY} if rate else {}


def run_cell(cell: Cell, data: dict[str, str]) -> dict:
    """Simulate a cell; returns what the report needs."""
    from agnmpi.simulation.timing import Timing
    from agnmpi.training.config import Config

    mine = EXPERIMENTS[cell.experiment]
    options = mine.options | {"path": data[cell.experiment]}
    numbers = mine.numbers(cell.method) | {"options": options, "seed": cell.seed}
    config = Config(problem=mine.problem, transport="local", device="cpu", **numbers)
    timing = STEP | mine.timing | travel(LINKS[cell.link], config.centers) | {"step_time": mine.step_time(cell.method)}
    row = simulated(config, Timing(time_seed=cell.seed, **timing), mine.metric)
    del row["staleness"]["histogram"]
    return {**cell._asdict(), **row}


def _option(experiment: str) -> str:
    return f"--{experiment.split('-')[0].lower()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, experiment in EXPERIMENTS.items():
        parser.add_argument(_option(name), default=experiment.data, help=f"data of {name} [{experiment.data}]")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", help="of the results")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--report", action="store_true", help="only tables and pictures, from the cells there are")
    only.add_argument("--check", action="store_true", help="only repeat three of the finished cells")
    args = parser.parse_args()
    data = {name: getattr(args, _option(name)[2:]) for name in EXPERIMENTS}
    data = {name: str(Path(path).resolve()) for name, path in data.items() if Path(path).exists()}
    import benchmark_drawings

    file = args.out / "benchmarks.jsonl"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.check:
        rows = [row for row in load(file) if row["experiment"] in data]
        sys.exit(0 if check(rows, min(3, len(rows)), Cell, run_cell, (data,)) else 1)
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        finish(cells(list(data)), run_cell, (data,), file, args.jobs)
    benchmark_drawings.write(args.out, load(file))


if __name__ == "__main__":
    main()
