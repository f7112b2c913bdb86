"""Figures of tests/MEASURED.md on faults and checkpoints:   python tests/support/measure.py [ROUNDS]

Times from a SIGKILL to the center's report (Open MPI with ULFM), the pause of service for a checkpoint against a
memory copy of the same bytes, and what resuming takes.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from launcher import ROOT, Job, mpi_kind

from agnmpi import adam
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.recovery.checkpoint import read_center
from agnmpi.recovery.saver import CenterSaver

PROBLEM = f"{ROOT / 'tests/support/problems.py'}:Quadratic"


def spread(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


def rank_of(pid):
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [entry for entry in environment if entry.startswith(b"OMPI_COMM_WORLD_RANK=")]
    return int(found[0].partition(b"=")[2]) if found else None


def kill_to_report(where, rank, event):
    """Seconds between a SIGKILL of `rank` and the event that tells of it."""
    run = where / "run"
    job = Job(
        4, sys.executable, "-m", "agnmpi", "train", PROBLEM, "--epochs", "1000", "--set", "options.slow=0.001",
        "--evaluate-every", "0", "--log-every", "0.2", "--run", run, launcher=("--with-ft", "ulfm"),
    )  # fmt: skip
    while not (run / "events.jsonl").exists() or "progress" not in (run / "events.jsonl").read_text():
        time.sleep(0.05)
    (victim,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and rank_of(p.name) == rank]
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    while f'"event": "{event}"' not in (run / "events.jsonl").read_text():
        time.sleep(0.01)
    job.process.send_signal(signal.SIGUSR1)
    job.finish(60)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return next(told["time"] for told in events if told["event"] == event) - killed


def pause_and_resume(where, n):
    """Pause of a checkpoint of n float32 with Adam at the center, memcpy of its bytes, and reading it back; seconds."""
    c = np.random.default_rng(0).random(n, np.float32)
    center = Center(rules.agn(), c, 1, adam(0.1))
    facts = {"centers": 1, "layout": {"offsets": [0, n]}}
    saver = CenterSaver(where, center, lambda: facts, print, keep=1)
    pauses, copies, reads = [], [], []
    for step in range(1, 8):
        center.steps = step
        start = time.perf_counter()
        saver.save(c)
        pauses.append(time.perf_counter() - start)
        saver._settle()
        start = time.perf_counter()
        [c.copy() for _ in range(3)]
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        read_center(saver.last)
        reads.append(time.perf_counter() - start)
    return pauses[1:], copies[1:], reads[1:]


def main(rounds=5):
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        pauses, copies, reads = pause_and_resume(where, 10_000_000)
        print(
            f"checkpoint of 10 M float32 with Adam at the center: pause {spread(pauses)} s, memcpy {spread(copies)} s"
        )
        print(f"reading and checking it: {spread(reads)} s")
        if mpi_kind() == "openmpi":
            for rank, event, said in (
                (2, "lost", "of a worker to the center's report"),
                (0, "failover", "of the center to the next one's first word"),
            ):
                times = [kill_to_report(Path(tempfile.mkdtemp(dir=name)), rank, event) for _ in range(rounds)]
                print(f"SIGKILL {said}: {spread(times)} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
