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

WORKERS, SEEDS = (1, 3, 8, 64, 16, 32), 3  # in this order
ADAM = 0.001  # the default rate
METHODS = {  # a function of n
    "AGN, λ = 10": lambda _: {"outer_rate": "published"},
    "AGN, λ = n": lambda n: {"outer_rate": "published", "period": n},
    "r = 1, λ = 10": lambda _: {"outer_rate": 1.0},
    "r = 1, λ = 10, rate · √n": lambda n: {"outer_rate": 1.0, "rate": ADAM * n**0.5},
}
# MLPs with one hidden layer; 2,700 steps of 32 samples over all workers, or 2,820.
PROBLEMS = {
    "digits": ("digits:Digits", {}, 60.0),
    "MNIST": ("mnist_mlp:Mnist", {"widths": [32], "samples": 6000}, 15.0),
    "Fashion-MNIST": ("mnist_mlp:FashionMnist", {"widths": [32], "samples": 6000}, 15.0),
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
    """All runs, seed by seed. At n = 1 the other methods are Adam in one process, which r = 1 is run for."""
    alone = ("AGN, λ = 10", "r = 1, λ = 10")
    return [
        Cell(problem, method, n, seed)
        for seed in range(SEEDS)
        for n in WORKERS
        for method in (METHODS if n > 1 else alone)
        for problem in problems
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
        evaluate_every=epochs / 3,
        seed=cell.seed,
        device="cpu",
        optimizer="adam",
        **numbers,
    )
    row = simulated(config, Timing(time_seed=cell.seed, **TIMES))
    curve = [[epoch, accuracy] for _, epoch, accuracy, _ in row["curve"]]
    return {**cell._asdict(), "epochs": epochs, "accuracy": row["accuracy"], "curve": curve, "seconds": row["seconds"]}


def table(rows: list[dict]) -> str:
    """Accuracy of each method minus that of one process with the same seed, mean over the seeds and least."""
    found = {tuple(row[name] for name in Cell._fields): row["accuracy"] for row in rows}
    text = ""
    for problem, (_, _, epochs) in PROBLEMS.items():
        one = {seed: found.get((problem, "r = 1, λ = 10", 1, seed)) for seed in range(SEEDS)}
        if not (alone := [value for value in one.values() if value is not None]):
            continue
        seeds = f"{len(alone)} seed" + "s" * (len(alone) > 1)
        text += f"\n**{problem}**, {epochs:g} epochs; one process: {mean(alone):.1f} % ({seeds})\n\n"
        text += f"| n | {' | '.join(METHODS)} |\n|{'---|' * (1 + len(METHODS))}\n"
        for n in sorted(WORKERS):
            line = []
            for method in METHODS:
                gaps = [
                    found[cell] - one[cell[-1]]
                    for seed in range(SEEDS)
                    if (cell := (problem, method, n, seed)) in found and one[seed] is not None
                ]
                least = f" ({min(gaps):+.1f})" if len(gaps) > 1 else ""
                line.append(f"{mean(gaps):+.1f}{least}" if gaps else "")
            text += f"| {n} | {' | '.join(line)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", default="mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", help="of Fashion-MNIST's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="of the results")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only the table, from the cells there are")
    args = parser.parse_args()
    directories = {"MNIST": args.mnist, "Fashion-MNIST": args.fashion}
    directories = {name: str(Path(path).resolve()) for name, path in directories.items() if Path(path).is_dir()}
    file = args.out / "defaults.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        finish(cells(["digits", *directories]), run_cell, (directories,), file, args.jobs)
    (args.out / "defaults.md").write_text(table(load(file)).lstrip())
    print((args.out / "defaults.md").read_text())


if __name__ == "__main__":
    main()
