"""Bytes that two hosts with four workers each exchange, in the flat layout and with a node center; one JSON line.

mpiexec -n 10, five ranks on each host: bytes_between_hosts.py NUMBERS PERIODS

On the first host the center and four workers; on the second four workers, and, where it is used, their node center.
Every worker makes PERIODS commits of NUMBERS float32, and the numbers of the interface eth0 of the second host count.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from agnmpi import AGNOptimizer, transports
from agnmpi.core import rules

NODE = 5  # the rank
LAYOUTS = {
    "flat": {},
    "node": {"node_centers": True},
    "node int8": {"node_centers": True, "encoding": "int8", "pull_encoding": "int8"},
}


def interface_bytes():
    """Received and sent by eth0 of this host, as this process sees it."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            numbers = counts.split()
            return int(numbers[0]) + int(numbers[8])
    raise SystemExit("this host has no eth0")


def train(comm, numbers, periods, options):
    """Returns the bytes, and the sum that every rank ends with."""
    x = np.zeros(numbers, np.float32)
    comm.Barrier()
    before = interface_bytes()
    opt = AGNOptimizer(None, x, comm, 1, rule=rules.downpour(), transport=transports.p2p(**options), overlap=True)
    for taken, _ in enumerate(opt.steps(None), 1):
        x += 1
        opt.step()
        if taken == periods:
            break
    opt.finish()
    comm.Barrier()
    used = comm.bcast(interface_bytes() - before, comm.size - 1)  # the last rank is on the second host
    (center,) = opt.center.values()
    opt.close()
    return used, float(center.mean())


if __name__ == "__main__":
    world, numbers, periods = MPI.COMM_WORLD, int(sys.argv[1]), int(sys.argv[2])
    found = {}
    for layout, options in LAYOUTS.items():
        without_node = not options and world.rank == NODE
        comm = world.Split(int(without_node), world.rank)
        result = None if without_node else train(comm, numbers, periods, options)
        found[layout] = world.bcast(result)
        comm.Free()
    if world.rank == 0:
        print(json.dumps(found))
