"""Center and workers, or a simulated run, in this process."""

import numpy as np
from golden import ONE_WORKER, close
from launcher import QUADRATIC

from agnmpi import adam
from agnmpi.arrays.backend import to_host
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Leases
from agnmpi.core.worker import Worker
from agnmpi.recovery.files import load
from agnmpi.training.config import Config
from agnmpi.transport.local import LocalCenter


def world(
    rule, optimizer, start, workers=1, period=1, total=None, center_optimizer=None, overlap=False, begin=True, xp=np,
    dtype=float, wait=True,
):  # fmt: skip
    """A center and its workers in this process; returns (center, local end, workers)."""
    start = xp.array(start, dtype)
    center = Center(rule, start, workers, center_optimizer)
    center.leases = Leases(total, period)
    local = LocalCenter(start.copy(), workers, center.apply)
    made = [
        Worker(xp.full_like(start, np.nan), rule, optimizer, local.worker_end(i), i, overlap, wait=wait)
        for i in range(workers)
    ]
    for worker in made:
        worker.total = total
        if begin:
            worker.begin()
    return center, local, made


def trajectory(rule, center_optimizer=None):
    """Where the center is after each exchange of workers that turn by turn take Adam's steps on noisy gradients."""
    rng, seen, period = np.random.default_rng(0), [], 5
    _, local, made = world(rule, adam(0.05), rng.normal(size=6), 4, period, center_optimizer=center_optimizer)
    for t in range(12 * period):
        for worker in made:
            worker.step(worker.x + rng.normal(size=6))
            if t % period == period - 1:
                seen.append(local.c.copy())
    return np.array(seen)


def follow_golden(case, xp=np):
    """One worker reproduces the numbers of golden.ONE_WORKER, its vectors where `xp` has them."""
    rule, optimizer, center_optimizer, gradients, start, period, local_after, center_after = ONE_WORKER[case]
    _, local, (worker,) = world(rule, optimizer, start, 1, period, center_optimizer=center_optimizer, xp=xp)
    for t, g in enumerate(gradients, 1):
        worker.step(xp.full(len(start), float(g)))
        if t in local_after:
            close(to_host(worker.x), local_after[t])
        if t in center_after:
            close(to_host(local.c), center_after[t])


def device_and_host(xp, overlap):
    """Two workers, AGN, Adam with clipping: where center and workers end on the device of `xp`, and on the host."""
    start, ends = np.linspace(-1, 1, 5), []
    for module in (xp, np):
        _, local, workers = world(rules.agn(), adam(0.05, clip=0.5), start, 2, 3, overlap=overlap, xp=module)
        rng = np.random.default_rng(4)
        for _ in range(20):
            for worker in workers:
                worker.step(module.asarray(rng.normal(size=5)))
        ends.append([to_host(v) for v in (local.c, workers[0].x, workers[1].x)])
    return ends


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
