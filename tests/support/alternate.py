"""Exchanges of this checkout against those of another one, taking turns:

python tests/support/alternate.py OTHER [ROUNDS]     with the Python of an environment that has an mpiexec

OTHER: directory of another checkout, such as `git worktree add ../old v0.4.0` makes. For each row of `agnmpi bench` the
median over the rounds of the exchange's time over its floor, here and there, with their ranges. Both run in the same
environment; the names of transports until 0.4.0 are translated.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher import ROOT, mpi_kind, mpiexec_path

BEFORE = {"accumulate": "serverless", "allreduce": "collective"}
NAMES = ["p2p", "rma", "accumulate", "allreduce"]


def measure(checkout, names, where):
    """Rows of one bench of a checkout: (transport, n) -> (seconds, ratio to the floor)."""
    file = Path(where) / "bench.json"
    command = [
        mpiexec_path(), "-n", "2", sys.executable, "-m", "agnmpi", "bench", "--transports", *names, "--sizes", "1",
        "1000000", "6000000", "--rounds", "60", "--quiet", "0", "--optimizer-size", "0", "--json", str(file),
    ]  # fmt: skip
    words = " ".join(command)
    subprocess.run(
        ["bash", "-c", f". {ROOT}/jobs/env-{mpi_kind()}.sh; exec {words}"], check=True, cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMPI_MCA_btl": "^ofi"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    back = {old: new for new, old in BEFORE.items()}
    return {
        (back.get(row["transport"], row["transport"]), row["n"]): (row["seconds"], row["ratio"])
        for row in json.loads(file.read_text())["exchanges"]
        if row["side"] == "agnmpi"
    }


def spread(values, scale=1.0):
    return f"{scale * statistics.median(values):.2f} ({scale * min(values):.2f}-{scale * max(values):.2f})"


def main(other, rounds=7):
    old_names = [
        BEFORE[name] if (Path(other) / "agnmpi/backend.py").is_file() and name in BEFORE else name for name in NAMES
    ]
    sides = {"here": (ROOT, NAMES), "there": (Path(other), old_names)}
    found = {side: {} for side in sides}
    with tempfile.TemporaryDirectory() as where:
        for _ in range(rounds):
            for side, (checkout, names) in sides.items():
                for row, values in measure(checkout, names, where).items():
                    found[side].setdefault(row, []).append(values)
    print(f"{mpi_kind()}, {rounds} rounds: × floor, median (range), here and there; ms likewise; here over there")
    for row, here in found["here"].items():
        there = found["there"][row]
        ratios = [[ratio for _, ratio in values] for values in (here, there)]
        times = [[seconds for seconds, _ in values] for values in (here, there)]
        relation = statistics.median(times[0]) / statistics.median(times[1])
        print(
            f"{row[0]:>10} {row[1]:>9,}  {spread(ratios[0])}  {spread(ratios[1])}   "
            f"{spread(times[0], 1e3)}  {spread(times[1], 1e3)}   {relation:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
