"""Worlds of real ranks for the conformance suite, wired as a run wires them."""

import numpy as np
from conformance import Outcome
from fake_device import OnFakeDevice

from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import capabilities
from agnmpi.core import rules
from agnmpi.core.params import parts


class MPIWorld:
    """The first ranks serve, the others work. `on_fake_device`: the workers' vectors lie on a device of fake_device."""

    def __init__(self, comm, setup, on_fake_device=False):
        self.comm, self.setup, self.on_fake_device = comm, setup, on_fake_device
        self.workers = comm.size - setup.centers
        self.capabilities = capabilities(setup)

    def blocks(self, n):
        return list(parts(n, self.setup.centers))

    def play(self, n, work, sessions=1, on_end=None, total=None):
        log, results = [], []
        role = connect(
            self.comm, rules.agn(), np.zeros(n), None, setup=self.setup,
            observe=lambda commit, _c: log.append(commit._replace(payload=None)),
        )  # fmt: skip
        if role.serves and on_end:
            on_end(role.end, role.center)
        for _ in range(sessions):
            if total is not None or not self.setup.use_locking:
                role.begin(total, 1)
            if role.serves:
                role.serve()
            else:
                (worker,) = role.workers
                end = OnFakeDevice(worker.end) if self.on_fake_device else worker.end
                results.append(work(end, worker.index))
        outcome = Outcome(results=results)
        if self.comm.rank == 0:
            outcome = Outcome(role.c.copy(), role.center, log)
        role.close()
        self.comm.Barrier()
        return outcome
