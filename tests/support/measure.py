"""Figures of tests/MEASURED.md on faults and checkpoints:   python tests/support/measure.py [ROUNDS]

Times from a SIGKILL to the center's report (Open MPI with ULFM), what a checkpoint of 300 MB costs (the pause of
service against a memory copy of the same bytes, how long a main thread that ticks each millisecond stands still while
the other writes, the peak of memory), and what resuming takes.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from launcher import QUADRATIC, ULFM, Job, events_of, mpi_kind

from agnmpi import adam
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.worker import Worker
from agnmpi.recovery.checkpoint import read_center
from agnmpi.recovery.saver import CenterSaver, WorkerSaver


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
        4, sys.executable, "-m", "agnmpi", "train", QUADRATIC, "--epochs", "1000", "--set", "options.slow=0.001",
        "--evaluate-every", "0", "--log-every", "0.2", "--run", run, launcher=ULFM,
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
    events = events_of(run)
    return next(told["time"] for told in events if told["event"] == event) - killed


def state(n):
    """c, and a center with Adam's slots: three vectors of n float32 in all."""
    c = np.random.default_rng(0).random(n, np.float32)
    center = Center(rules.agn(), c, 1, adam(0.1))
    for slot in center.optimizer.slots(center.state).values():
        slot[...] = c  # memory that was never written costs nothing
    return c, center


def told(n):
    layout = {"names": ["w"], "shapes": [[n]], "offsets": [0, n], "dtype": "float32"}
    return {"centers": 1, "workers": 1, "layout": layout, "samples": 0, "seconds": 0.0}


def peak():
    """Bytes of memory at most so far, since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def stall(done):
    """Longest time for which this thread, ticking each millisecond, stood still until `done()`."""
    worst, last = 0.0, time.perf_counter()
    while not done():
        time.sleep(1e-3)
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
    return worst


def cost(where, n=25_000_000):
    """What a checkpoint of 3 n float32 costs; run it in a process of its own. Prints JSON."""
    c, center = state(n)
    saver = CenterSaver(Path(where), center, lambda: told(n), print, keep=1)
    start = time.perf_counter()
    copies = [c.copy() for _ in range(3)]
    copied = time.perf_counter() - start
    del copies
    center.steps, before = 1, forget_peak()
    start = time.perf_counter()
    saver.save(c)
    pause = time.perf_counter() - start
    stood = stall(lambda: not saver.writing())
    at_center = peak() - before
    saver.finish()
    worker = Worker(c, rules.agn(), adam(0.1), None, 0)
    for slot in worker.optimizer.slots(worker.state).values():
        slot[...] = c
    worker.o[...] = c
    before = forget_peak()
    WorkerSaver(Path(where), worker, 1, "all", print).finish(1)
    print(
        json.dumps({
            "state_MB": 12 * n / 1e6, "extra_peak_MB": at_center / 1e6, "pause_s": pause, "stall_s": stood,
            "memcpy_s": copied, "worker_state_MB": 16 * n / 1e6, "worker_extra_peak_MB": (peak() - before) / 1e6,
        })
    )  # fmt: skip


def resume_time(where, n):
    c, center = state(n)
    saver = CenterSaver(where, center, lambda: told(n), print, keep=1)
    center.steps = 1
    saver.save(c)
    saver.finish()
    reads = []
    for _ in range(5):
        start = time.perf_counter()
        read_center(saver.last)
        reads.append(time.perf_counter() - start)
    return reads


def main(rounds=5):
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        command = [sys.executable, __file__, "cost", name]
        found = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(rounds)]
        for key in found[0]:
            print(f"a checkpoint: {key} {spread([row[key] for row in found])}")
        print(f"reading and checking 300 MB: {spread(resume_time(where, 25_000_000))} s")
        if mpi_kind() == "openmpi":
            for rank, event, said in (
                (2, "lost", "of a worker to the center's report"),
                (0, "failover", "of the center to the next one's first word"),
            ):
                times = [kill_to_report(Path(tempfile.mkdtemp(dir=name)), rank, event) for _ in range(rounds)]
                print(f"SIGKILL {said}: {spread(times)} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["cost"]:
        cost(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:]))
