"""Which defaults train as well as one process at equal epochs? n = 1 … 64 on three problems, in virtual time.

python examples/evidence/defaults.py --mnist DIRECTORY --fashion DIRECTORY     (pip install '.[examples]')

Finished cells are kept in OUT/defaults.jsonl and skipped when it is started again; the table is made at the end, or
with --report alone. A problem whose directory is not there is left out.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "paper"))

from resumable import finish, load, simulated

WORKERS, SEEDS = (1, 3, 8, 32, 64, 16), 3  # in this order
ADAM = 0.001  # the default rate of one process
DEFAULT = "default"
METHODS = {  # a function of n
    DEFAULT: lambda _: {"rate": None, "outer_rate": None},
    "AGN, λ = 10": lambda _: {"outer_rate": "published"},
    "r = 1, λ = 10": lambda _: {"outer_rate": 1.0},
    "r = 1, λ = 10, rate · √n": lambda n: {"outer_rate": 1.0, "rate": ADAM * n**0.5},
    "AGN, λ = n": lambda n: {"outer_rate": "published", "period": n},
    "default, overlap": lambda _: {"rate": None, "outer_rate": None, "overlap": True},
    "the same, r = 0.7": lambda n: {"rate": ADAM * min(n, 8), "warmup": 32 * n, "outer_rate": 0.7, "overlap": True},
}
# MLPs with one hidden layer; 2,700 steps of 32 samples over all workers, or 2,820; with all images 18,750.
PROBLEMS = {
    "digits": ("digits:Digits", {}, 60.0),
    "MNIST": ("mnist_mlp:Mnist", {"widths": [32], "samples": 6000}, 15.0),
    "Fashion-MNIST": ("mnist_mlp:FashionMnist", {"widths": [32], "samples": 6000}, 15.0),
    "MNIST, all images": ("mnist_mlp:Mnist", {"widths": [32]}, 10.0),
    "Fashion-MNIST, all images": ("mnist_mlp:FashionMnist", {"widths": [32]}, 10.0),
}
# Workers whose steps take 10 ms ± 30 %, and that start within a period.
TIMES = {"step_time": 0.01, "step_distribution": "normal", "step_spread": 0.3, "start_jitter": 0.1}


class Cell(NamedTuple):
    """A run; `seed` is that of the parameters, the order of samples and the times."""

    problem: str
    method: str
    workers: int
    seed: int


def cells(problems: list[str]) -> list[Cell]:
    """All runs, method by method; with all images the default alone. At n = 1 all but AGN are Adam in one process."""
    return [
        Cell(problem, method, n, seed)
        for method in METHODS
        for seed in range(SEEDS)
        for n in WORKERS
        for problem in problems
        if n > 1 or method in (DEFAULT, "AGN, λ = 10")
        if n <= 8 or "all" not in problem
        if method == DEFAULT or "all" not in problem
    ]


def run_cell(cell: Cell, directories: dict[str, str]) -> dict:
    """Simulate a cell; returns what the table needs."""
    from agnmpi.simulation.timing import Timing
    from agnmpi.training.config import Config

    name, options, epochs = PROBLEMS[cell.problem]
    numbers = {"period": 10, "rate": ADAM} | METHODS[cell.method](cell.workers)
    config = Config(
        problem=name,
        options=options | ({"path": directories[cell.problem]} if cell.problem in directories else {}),
        transport="local",
        workers=cell.workers,
        batch=32,
        epochs=epochs,
        evaluate_every=0.0,
        seed=cell.seed,
        device="cpu",
        optimizer="adam",
        **numbers,
    )
    row = simulated(config, Timing(time_seed=cell.seed, **TIMES))
    return {**cell._asdict(), "epochs": epochs, "accuracy": row["accuracy"], "seconds": row["seconds"]}


def table(rows: list[dict]) -> str:
    """Accuracy minus that of one process with the same seed: mean, least and greatest, and of how many seeds."""
    found = {tuple(row[name] for name in Cell._fields): row["accuracy"] for row in rows}
    text = ""
    for problem, (_, _, epochs) in PROBLEMS.items():
        one = {seed: found[cell] for seed in range(SEEDS) if (cell := (problem, DEFAULT, 1, seed)) in found}
        if not one:
            continue
        gaps = {
            (method, n): [found[cell] - one[seed] for seed in one if (cell := (problem, method, n, seed)) in found]
            for method in METHODS
            for n in WORKERS
            if n > 1 or method != DEFAULT
        }
        methods = [method for method in METHODS if any(gaps.get((method, n)) for n in WORKERS)]
        text += f"\n**{problem}**, {epochs:g} epochs; one process: {_mean([*one.values()], '.1f')}\n"
        if not methods:
            continue
        text += f"\n| n | {' | '.join(methods)} |\n|{'---|' * (1 + len(methods))}\n"
        for n in sorted(WORKERS):
            line = [_mean(gaps.get((method, n), []), "+.1f") for method in methods]
            text += f"| {n} | {' | '.join(line)} |\n" if any(line) else ""
    return text


def _mean(values: list[float], form: str) -> str:
    """The mean, the least and the greatest, and how many there are."""
    if not values:
        return ""
    middle, least, most = (f"{round(f(values), 1) + 0.0:{form}}" for f in (mean, min, max))  # no -0.0
    return middle if len(values) == 1 else f"{middle} ({least} to {most}; {len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", default="mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", help="of Fashion-MNIST's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="of the results")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only the table, from the cells there are")
    args = parser.parse_args()
    found = {"mnist_mlp:Mnist": args.mnist, "mnist_mlp:FashionMnist": args.fashion}
    directories = {name: found[of] for name, (of, *_) in PROBLEMS.items() if of in found and Path(found[of]).is_dir()}
    directories = {name: str(Path(path).resolve()) for name, path in directories.items()}
    file = args.out / "defaults.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        finish(cells(["digits", *directories]), run_cell, (directories,), file, args.jobs)
    (args.out / "defaults.md").write_text(table(load(file)).lstrip())
    print((args.out / "defaults.md").read_text())


if __name__ == "__main__":
    main()
