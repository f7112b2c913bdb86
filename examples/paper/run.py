"""The experiment of arXiv:1710.02368 in virtual time, with the code that trains over MPI; see cells.py.

python examples/paper/run.py --quick --data DIRECTORY_OF_MNIST     (pip install matplotlib)

Finished cells are kept in OUT/cells.jsonl and skipped when it is started again; tables and pictures are made at the
end, or with --report alone.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
from cells import FULL, LARGE, LONG, METHODS, QUICK, SCENES, Cell, Size, full, large, long, quick
from resumable import finish, load, simulated

MNIST = f"{Path(__file__).resolve().parent.parent}/mnist_mlp.py:Mnist"


def run_cell(cell: Cell, size: Size, data: str, device: str = "cpu") -> dict:
    """Simulate a cell; returns what the report needs."""
    from agnmpi.simulation.timing import Timing
    from agnmpi.training.config import Config

    config = Config(
        problem=MNIST,
        options={"path": data, "widths": size.widths},
        transport="local",
        workers=cell.workers,
        period=cell.period,
        optimizer="adam",
        rate=0.001,
        batch=128,
        epochs=size.epochs,
        evaluate_every=size.evaluate_every,
        seed=cell.seed,
        device=device,
        **METHODS[cell.method],
    )
    row = simulated(config, Timing(time_seed=cell.seed, **SCENES[cell.scene]))
    return {**cell._asdict(), **row, "size": size._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="784-200-200-10, 8 epochs, 3 seeds: a quarter of an hour")
    which.add_argument("--long", action="store_true", help="40 epochs of some of these cells, 1 seed: ten minutes")
    which.add_argument("--large", action="store_true", help="784-1000-2000-1000-10, 10 epochs, 11 pairs: hours")
    which.add_argument("--full", action="store_true", help="784-1000-2000-1000-10, 40 epochs, 49 cells: days on a CPU")
    parser.add_argument("--data", default="mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--out", type=Path, help="directory of the results [default: results/ beside this file]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="with gpu, give --jobs 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only tables and pictures, from the cells there are")
    args = parser.parse_args()
    sizes = {"quick": (QUICK, quick), "long": (LONG, long), "large": (LARGE, large), "full": (FULL, full)}
    name = next((name for name in sizes if getattr(args, name)), "quick")
    size, cells = sizes[name][0], sizes[name][1]()
    out = args.out or Path(__file__).parent / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cells.jsonl"
    if not args.report:
        finish(cells, run_cell, (size, str(Path(args.data).resolve()), args.device), file, args.jobs)
    report.write(out, load(file))


if __name__ == "__main__":
    main()
