"""Experiments in cells, one run each: finished cells are kept in a file, and skipped when it is started again."""

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path


def load(file: Path) -> list[dict]:
    """Read the finished cells; a line that a crash cut short is left out."""
    if not file.exists():
        return []
    with file.open() as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def simulated(config, timing, metric: str = "accuracy") -> dict:
    """Simulate a run; returns what a report needs, an accuracy in %.

    `config`: without a directory, which is made and removed; `metric`: of its problem.
    """
    from dataclasses import replace

    from agnmpi.simulation import simulate

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        result = simulate.run(replace(config, run_dir=directory), timing)()
        events = [json.loads(line) for line in Path(directory, "events.jsonl").read_text().splitlines()]
    kept = {key: result[key] for key in ("commits", "samples", "staleness", "virtual", "agnmpi")}
    return {
        **kept,
        "dropped": result.get("dropped", 0),
        metric: result["metrics"][metric] * (100 if metric == "accuracy" else 1),
        "curve": [  # virtual seconds, epoch, the metric of the center, training loss
            [round(e["virtual_seconds"], 4), e["epoch"], e["metrics"][metric], e["loss"]]
            for e in events
            if e["event"] == "evaluation"
        ],
        "seconds": round(time.monotonic() - started, 1),
    }


def finish(cells: Sequence, work: Callable, given: tuple, file: Path, jobs: int) -> None:
    """Append the cells that `file` lacks: for each what `work(cell, *given)` returns, in `jobs` processes.

    A cell is a NamedTuple; its fields are in its row.
    """
    rows = load(file)
    if file.exists() and not file.read_text().endswith("\n"):  # a crash has cut the last line short
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {tuple(row[name] for name in cell._fields) for cell in cells[:1] for row in rows}
    left = [cell for cell in cells if tuple(cell) not in done]
    print(f"{len(cells)} cells, {len(left)} to do, {jobs} at a time; results in {file.parent}/", flush=True)
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come: one for each core
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, file.open("a") as log:
        futures = {pool.submit(work, cell, *given): cell for cell in left}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                row = future.result()
                log.write(json.dumps(row) + "\n")
                log.flush()
                to_go = (time.monotonic() - started) / count * (len(left) - count)
                cell = " ".join(f"{name}={value}" for name, value in futures[future]._asdict().items())
                print(
                    f"{count}/{len(left)}  {cell}: {_said(row)}  ({row['seconds']} s; {to_go:.0f} s left)",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _said(row: dict) -> str:
    return f"{row['accuracy']:.2f} %" if "accuracy" in row else f"loss {row['loss']:.4f}"


def check(rows: Sequence[dict], count: int, cell_type: type, work: Callable, given: tuple) -> bool:
    """Repeat `count` of the finished cells, drawn at random; whether they give the same numbers, to six digits.

    Prints of each cell in what it differs; the time that it took may. Another processor rounds differently.
    """
    same = True
    for row in random.sample(rows, count):
        cell = cell_type(*(row[name] for name in cell_type._fields))
        again = json.loads(json.dumps(work(cell, *given)))
        others = [key for key in row if key != "seconds" and row[key] != again[key]]
        differ = [key for key in others if not _alike(row[key], again[key])]
        said = f"DIFFERS in {', '.join(differ)}" if differ else "the same to six digits" if others else "the same"
        print(f"{cell}: {said}", flush=True)
        same = same and not differ
    return same


def _alike(a: object, b: object) -> bool:
    """Whether two values read from JSON differ in nothing but the last digits of numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
