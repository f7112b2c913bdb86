"""The cost of more workers at a p2p center: a poll, a reply, a commit. `python -m agnmpi.bench.scaling`

The workers are fake, in this process, so the results include Python's work at the center, but not MPI's.
"""

import statistics
from typing import Any

import numpy as np

from ..core import rules
from ..core.center import Center
from ..core.leases import Leases
from ..core.messages import PULL, WORK, Commit
from ..transport.p2p_center import P2PCenter
from .exchanges import timed
from .fake_peers import FakePeers

_ROUNDS = 300


def center_of_fakes(workers: int, numbers: int = 10_000) -> tuple[FakePeers, P2PCenter, Center]:
    """A center variable of `numbers` float32, its end and its state, with `workers` fake workers."""
    peers: Any = FakePeers(workers)
    end = P2PCenter(peers, np.zeros(numbers, np.float32))
    center = Center(rules.agn(), end.c, workers)
    center.leases, center.on_block = Leases(None, 10), end.move_on
    end.open()
    return peers, end, center


def commit_of(center: Center, worker: int) -> Commit:
    """A commit of steps just granted to the worker; it requests c and more work."""
    assert center.leases is not None
    lease, sequence = center.leases.grant(worker), center.applied[worker] + 1
    return Commit(worker, sequence, lease.steps, lease.first, center.clock, requests=WORK | PULL)


def measure(workers: int) -> dict[str, float]:
    """Cost with `workers` workers: medians, and the bytes of a reply's header.

    Returns:
        `look_us`: microseconds of a poll that finds nothing; `reply_bytes`; `commit_us`: of a commit
        of 10,000 numbers, from its header to the sends of c.
    """
    peers, end, center = center_of_fakes(workers)

    def serve_one() -> None:
        end.serve_one(center.apply)

    looks = [1e6 * timed(serve_one) for _ in range(_ROUNDS)]
    commits, nbytes = [], []
    for i in range(_ROUNDS):
        peers.send(commit_of(center, i % workers), end.c.nbytes)
        before = peers.nbytes["reply"]
        commits.append(1e6 * timed(serve_one))
        nbytes.append(peers.nbytes["reply"] - before)
    assert center.clock == _ROUNDS
    return {
        "look_us": statistics.median(looks),
        "reply_bytes": statistics.median(nbytes),
        "commit_us": statistics.median(commits),
    }


def main() -> None:
    """Print a table."""
    print(f"{'n':>6} {'look µs':>10} {'reply bytes':>12} {'commit µs':>10}")
    for workers in (10, 100, 1000):
        row = measure(workers)
        print(f"{workers:6} {row['look_us']:10.2f} {row['reply_bytes']:12.0f} {row['commit_us']:10.1f}")


if __name__ == "__main__":
    main()
