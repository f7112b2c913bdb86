"""Worlds of real ranks for the conformance suite, wired as a run wires them."""

import numpy as np
from conformance import Outcome
from fake_device import OnFakeDevice

from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup
from agnmpi.core import rules
from agnmpi.core.observer import Observer
from agnmpi.core.params import parts


class Log(Observer):
    """The commits in the order in which they were applied."""

    def __init__(self):
        self.commits = []

    def committed(self, commit, c):
        self.commits.append(commit._replace(payload=None))


class MPIWorld:
    """The first ranks serve, the others work.

    `on_fake_device`: the workers' vectors lie on a fake device; `threaded`: exchanges run in a thread.
    """

    def __init__(self, comm, transport, on_fake_device=False, threaded=False):
        self.comm, self.transport, self.on_fake_device = comm, transport, on_fake_device
        self.threaded = threaded
        self.workers = transport.workers_among(comm.size)
        self.capabilities = transport.capabilities

    def blocks(self, n):
        return list(parts(n, self.transport.centers))

    def play(self, n, work, sessions=1, on_end=None, total=None):
        log, results = Log(), []
        role = connect(
            self.comm, rules.agn(), np.zeros(n), setup=Setup(self.transport, overlap=self.threaded), observer=log
        )
        if role.serves and on_end:
            on_end(role.end, role.center)
        for _ in range(sessions):
            if total is not None or not self.capabilities.single_commits:
                role.begin(total, 1)
            if role.serves:
                role.serve()
            else:
                (worker,) = role.workers
                end = OnFakeDevice(worker.end) if self.on_fake_device else worker.end
                results.append(work(end, worker.index))
        outcome = Outcome(results=results)
        if self.comm.rank == 0:
            outcome = Outcome(role.c.copy(), role.center, log.commits)
        role.close()
        self.comm.Barrier()
        return outcome
