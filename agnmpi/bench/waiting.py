"""The cost of waiting: CPU time of idle ranks, and latency of the first exchange after a pause."""

import json
import statistics
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..core import rules
from ..core.center import Center, serve
from ..core.messages import Commit
from ..transport.agreement import allgather
from ..transport.p2p import P2PWorker
from ..transport.p2p_center import P2PCenter
from .exchanges import barrier


def waiting_cost(comm: MPI.Intracomm, repeats: int, pause: float = 0.2, n: int = 1000) -> dict[str, float]:
    """The cost of waiting: fraction of a core while idle, and the exchange after a pause of the workers.

    `center_cpu`, `worker_cpu`: CPU time over wall time of a waiting center and of a waiting worker.
    """
    x = np.zeros(n, np.float32)
    end: Any = P2PCenter(comm, x.copy()) if comm.rank == 0 else P2PWorker(comm)
    samples: dict[str, list[float]] = {"cpu": [], "busy": [], "quiet": []}
    for _ in range(repeats):
        barrier(comm)
        # The workers pause: the center waits.
        start, cpu = time.perf_counter(), time.process_time()
        if comm.rank == 0:
            serve(end, Center(rules.agn(), x, comm.size - 1).apply)
            samples["cpu"].append((time.process_time() - cpu) / (time.perf_counter() - start))
        else:
            out = np.empty_like(x)

            for sequence, kind in enumerate(("busy", "busy", "quiet"), 1):
                if kind == "quiet":
                    time.sleep(pause)
                start = time.perf_counter()
                end.exchange(Commit(comm.rank - 1, sequence, steps=1, payload=x), out).wait()
                seconds = time.perf_counter() - start
                if sequence > 1:
                    samples[kind].append(seconds)
            end.leave(None, out).wait()
        # The center pauses before it applies: the workers wait.
        barrier(comm)
        if comm.rank == 0:
            center = Center(rules.agn(), x, comm.size - 1)

            def late(commit: Commit, c: Array, center: Center = center) -> Any:
                if commit.payload is not None and not center.clock:
                    time.sleep(pause)
                return center.apply(commit, c)

            serve(end, late)
        else:
            start, cpu = time.perf_counter(), time.process_time()
            end.exchange(Commit(comm.rank - 1, 1, steps=1, payload=x), out).wait()
            samples["cpu"].append((time.process_time() - cpu) / (time.perf_counter() - start))
            end.leave(None, out).wait()
    by_rank = [json.loads(text) for text in allgather(comm, json.dumps(samples))]

    def median(key: str) -> float:
        return float(statistics.median(value for other in by_rank[1:] for value in other[key]))

    return {
        "center_cpu": statistics.median(by_rank[0]["cpu"]),
        "worker_cpu": median("cpu"),
        "busy_seconds": median("busy"),
        "quiet_seconds": median("quiet"),
    }
