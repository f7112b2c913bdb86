"""The experiment of arXiv:1710.02368 in virtual time, with the code that trains over MPI; see cells.py.

python examples/paper/run.py --quick --data DIRECTORY_OF_MNIST     (pip install matplotlib)

Finished cells are kept in OUT/cells.jsonl and skipped when it is started again; tables and pictures are made at the
end, or with --report alone.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
from cells import FULL, LONG, METHODS, QUICK, SCENES, Cell, Size, full, long, quick

MNIST = f"{Path(__file__).resolve().parent.parent}/mnist_mlp.py:Mnist"


def run_cell(cell: Cell, size: Size, data: str, device: str = "cpu") -> dict:
    """Simulate a cell; returns what the report needs."""
    from agnmpi.simulation import simulate
    from agnmpi.simulation.timing import Timing
    from agnmpi.training.config import Config

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
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
            run_dir=directory,
            **METHODS[cell.method],
        )
        result = simulate.run(config, Timing(time_seed=cell.seed, **SCENES[cell.scene]))()
        events = [json.loads(line) for line in Path(directory, "events.jsonl").read_text().splitlines()]
    curve = [
        [round(e["virtual_seconds"], 4), e["epoch"], e["metrics"]["accuracy"], e["loss"]]
        for e in events
        if e["event"] == "evaluation"
    ]
    kept = {key: result[key] for key in ("commits", "samples", "staleness", "virtual", "agnmpi")}
    return {
        **cell._asdict(),
        **kept,
        "accuracy": 100 * result["metrics"]["accuracy"],
        "curve": curve,  # virtual seconds, epoch, validation accuracy, training loss
        "size": size._asdict(),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="784-200-200-10, 8 epochs, 3 seeds: a quarter of an hour")
    which.add_argument("--long", action="store_true", help="40 epochs of some of these cells, 1 seed: ten minutes")
    which.add_argument("--full", action="store_true", help="784-1000-2000-1000-10, 40 epochs, 49 cells: days on a CPU")
    parser.add_argument("--data", default="mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--out", type=Path, help="directory of the results [default: results/ beside this file]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="with gpu, give --jobs 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only tables and pictures, from the cells there are")
    args = parser.parse_args()
    name = "full" if args.full else "long" if args.long else "quick"
    size, cells = {"quick": (QUICK, quick()), "long": (LONG, long()), "full": (FULL, full())}[name]
    out = args.out or Path(__file__).parent / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    file = out / "cells.jsonl"
    rows = report.load(file)
    if file.exists() and not file.read_text().endswith("\n"):  # a crash has cut the last line short
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {report.cell_of(row) for row in rows}
    left = [] if args.report else [cell for cell in cells if cell not in done]
    print(f"{len(cells)} cells, {len(left)} to do, {args.jobs} at a time; results in {out}/", flush=True)
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come: one for each core
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool, file.open("a") as log:
        futures = [pool.submit(run_cell, cell, size, str(Path(args.data).resolve()), args.device) for cell in left]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                row = future.result()
                log.write(json.dumps(row) + "\n")
                log.flush()
                to_go = (time.monotonic() - started) / count * (len(left) - count)
                print(
                    f"{count}/{len(left)}  {row['scene']} {row['method']} n={row['workers']} λ={row['period']} seed "
                    f"{row['seed']}: {row['accuracy']:.2f} %  ({row['seconds']} s; {to_go:.0f} s left)",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    report.write(out, report.load(file))


if __name__ == "__main__":
    main()
