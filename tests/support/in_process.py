"""Center and workers, or a simulated run, in this process."""

import numpy as np
from launcher import ROOT

from agnmpi.core.center import Center
from agnmpi.core.leases import Leases
from agnmpi.core.worker import Worker
from agnmpi.recovery.files import load
from agnmpi.training.config import Config
from agnmpi.transport.local import LocalCenter


def world(
    rule, optimizer, start, workers=1, period=1, total=None, center_optimizer=None, overlap=False, begin=True, xp=np
):
    """A center and its workers in this process; returns (center, local end, workers)."""
    start = xp.array(start, float)
    center = Center(rule, start, workers, center_optimizer)
    center.leases = Leases(total, period)
    local = LocalCenter(start.copy(), workers, center.apply)
    made = [
        Worker(xp.full_like(start, np.nan), rule, optimizer, local.worker_end(i), i, overlap) for i in range(workers)
    ]
    for worker in made:
        worker.total = total
        if begin:
            worker.begin()
    return center, local, made


QUADRATIC = f"{ROOT}/tests/support/problems.py:Quadratic"
UNEVEN = {
    "step_distribution": "normal", "speed_spread": 0.2, "stragglers": 0.25, "start_jitter": 0.05,
    "service": 0.004, "latency": 0.001, "bandwidth": 1e4,
}  # fmt: skip


def config(run, workers, **options):
    given = {"problem": QUADRATIC, "transport": "local", "period": 3, "epochs": 8, "batch": 16, "rate": 0.05}
    return Config(**given | {"workers": workers, "run_dir": str(run)} | options)


def center(run):
    arrays, _ = load(run / "center.safetensors")
    return b"".join(arrays[name].tobytes() for name in sorted(arrays))
