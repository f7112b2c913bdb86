"""Worlds of real ranks for the conformance suite, wired as a run wires them."""

import numpy as np
from conformance import Outcome
from paper import OnPaper

from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import capabilities
from agnmpi.core import rules
from agnmpi.core.params import parts


class MPIWorld:
    """The first ranks serve, the others work. `on_paper`: the workers' vectors lie on a device of paper."""

    def __init__(self, comm, setup, on_paper=False):
        self.comm, self.setup, self.on_paper = comm, setup, on_paper
        self.workers = comm.size - setup.centers
        self.capabilities = capabilities(setup)

    def blocks(self, n):
        return list(parts(n, self.setup.centers))

    def play(self, n, work, sessions=1, on_end=None, total=None):
        log, results = [], []
        member = connect(
            self.comm, rules.agn(), np.zeros(n), None, setup=self.setup,
            observe=lambda commit, _c: log.append(commit._replace(payload=None)),
        )  # fmt: skip
        if member.serves and on_end:
            on_end(member.end, member.center)
        for _ in range(sessions):
            if total is not None or not self.setup.use_locking:
                member.begin(total, 1)
            if member.serves:
                member.serve()
            else:
                (worker,) = member.workers
                end = OnPaper(worker.end) if self.on_paper else worker.end
                results.append(work(end, worker.index))
        outcome = Outcome(results=results)
        if self.comm.rank == 0:
            outcome = Outcome(member.c.copy(), member.center, log)
        member.close()
        self.comm.Barrier()
        return outcome
