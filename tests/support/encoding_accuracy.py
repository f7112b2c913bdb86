"""Accuracy on MNIST with each encoding, both ways, in virtual time.

python tests/support/encoding_accuracy.py MNIST OUT [--widths 256 128] [--epochs 3] [--seeds 5] [--jobs 2]

MNIST: the directory of its IDX files; OUT: where the runs go; runs that have ended there are not repeated. n/λ = 0.4, 1
and 2 (λ = 10; 4, 10 and 20 workers), batches of 128, Adam. Prints the mean accuracy over the seeds (least to greatest),
and the mean over the seeds of its difference from float32's with the same seed, in points.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher import ROOT

ENCODINGS = ("float32", "bf16", "int8", "int4")
WORKERS = (4, 10, 20)


def accuracy(run_dir, workers, encoding, seed, args):
    """Accuracy in % at the end of one run, which is made if it is not there."""
    result = run_dir / "result.json"
    if not result.is_file():
        widths = ",".join(map(str, args.widths))
        command = [sys.executable, "-m", "agnmpi", "simulate", str(ROOT / "examples/mnist_mlp.py:Mnist")]
        options = {
            "workers": workers, "period": 10, "batch": 128, "epochs": args.epochs, "optimizer": "adam", "seed": seed,
            "encoding": encoding, "pull-encoding": encoding, "outer-rate": "published", "run-dir": run_dir,
        }  # fmt: skip
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command += ["--set", f"options.path={args.mnist.resolve()}", "--set", f"options.widths=[{widths}]"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run_dir}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return 100 * json.loads(result.read_text())["metrics"]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    args = parser.parse_args()
    runs = [(n, encoding, seed) for seed in range(args.seeds) for n in WORKERS for encoding in ENCODINGS]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = [args.out / f"n{n}-{encoding}-{seed}" for n, encoding, seed in runs]
        found = dict(zip(runs, pool.map(lambda folder, run: accuracy(folder, *run, args), folders, runs)))
    print("| n/λ | " + " | ".join(ENCODINGS) + " |\n|" + "---|" * (1 + len(ENCODINGS)))
    for n in WORKERS:
        cells = []
        for encoding in ENCODINGS:
            all_of = [found[n, encoding, seed] for seed in range(args.seeds)]
            beside = statistics.mean(found[n, encoding, s] - found[n, "float32", s] for s in range(args.seeds))
            cells.append(f"{statistics.mean(all_of):.2f} ({min(all_of):.2f}-{max(all_of):.2f}), {beside:+.2f}")
        print(f"| {n / 10} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
