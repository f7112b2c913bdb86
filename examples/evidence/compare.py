"""Rules on workers whose speeds differ, in virtual time, with the code that trains over MPI; see scenarios.py.

python examples/evidence/compare.py --data DIRECTORY_OF_MNIST     (pip install '.[paper]')

Finished cells are kept in OUT/cells.jsonl and skipped when it is started again; tables and pictures are made at the
end, or with --report alone. --check repeats three finished cells, drawn at random, and compares all their numbers.
"""

import argparse
import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "paper"))

import drawings
import scenarios
from resumable import check, finish, load, simulated
from scenarios import Cell, Size

HERE = Path(__file__).resolve().parent


def run_cell(cell: Cell, size: Size, data: str) -> dict:
    """Simulate a cell; returns what the report needs."""
    row = simulated(scenarios.config(cell, size, data), scenarios.timing(cell))
    del row["staleness"]["histogram"]
    speed = row["samples"] / row["virtual"]["seconds"] / scenarios.fastest(cell, size)
    return {**cell._asdict(), **row, "speed": speed, "size": size._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory of the results")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--report", action="store_true", help="only tables and pictures, from the cells there are")
    only.add_argument("--check", action="store_true", help="only repeat three of the finished cells")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file, given = args.out / "cells.jsonl", (scenarios.SIZE, str(Path(args.data).resolve()))
    if args.check:
        sys.exit(0 if check(load(file), 3, Cell, run_cell, given) else 1)
    if not args.report:
        finish(scenarios.cells(), run_cell, given, file, args.jobs)
    drawings.write(args.out, load(file))


if __name__ == "__main__":
    main()
