"""A center, node centers and their workers in this process, in whatever order a test lets them act."""

import numpy as np

from agnmpi.cluster.node import NodeEnd
from agnmpi.core.center import Center
from agnmpi.core.leases import Leases, Shares
from agnmpi.core.worker import Worker
from agnmpi.transport.composed import encode
from agnmpi.transport.local import LocalCenter


class Tree:
    """`direct`: workers of the center itself; `hosts`: the number of workers of each node center."""

    def __init__(
        self, rule, optimizer, start, direct, hosts, period=1, overlap=False, encoding="float32",
        pull_encoding="float32", dtype=float, wait=True,
    ):  # fmt: skip
        start, n = np.array(start, dtype), direct + sum(hosts)
        self.period, self.count = period, n
        self.top = Center(rule, start, n)
        self.top.nodes, self.top.applied = set(range(n, n + len(hosts))), [0] * (n + len(hosts))
        self.local = LocalCenter(start.copy(), direct + len(hosts), self.top.apply, pull_encoding)
        self.nodes, ends = [], [self.local.worker_end(i) for i in range(direct)]
        for number, workers in enumerate(hosts, n):
            below = LocalCenter(np.full_like(start, np.nan), workers, None)
            above = encode(self.local.worker_end(number), start, encoding, pull_encoding)
            self.nodes.append(NodeEnd(below, above, Center(rule, start, n), number))
            ends += [below.worker_end(len(ends) + i) for i in range(workers)]
        for center in self.centers:
            center.idle_workers_wait = True
        self.workers = [
            Worker(np.full_like(start, np.nan), rule, optimizer, end, i, overlap, wait=wait)
            for i, end in enumerate(ends)
        ]

    @property
    def centers(self):
        return [self.top, *(node.center for node in self.nodes)]

    def begin(self, total):
        """Begin a session."""
        self.top.leases = Leases(total, self.period)
        self.local.open()
        for node in self.nodes:
            node.center.leases = Shares(total, self.period)
            node.begin(total, self.period, 0)
            node.open()
        for worker in self.workers:
            worker.total = total

    def play(self, total, gradient, choose, most=None, after=lambda: None):
        """A session: `choose(k)` of k actors acts next; `most[i]`: after as many steps worker i leaves.

        `gradient(worker, step)`; `after()` is called after each act. Returns the steps that each worker took.
        """
        self.begin(total)
        taken = [[] for _ in self.workers]
        loops = [
            self.loop(worker, gradient, taken[worker.index], (most or {}).get(worker.index)) for worker in self.workers
        ]
        waits = dict.fromkeys(range(len(loops)))  # the handle that each loop waits for
        idle = 0
        while waits:
            actors = [*waits, self.local, *self.nodes]
            actor = actors[choose(len(actors))]
            if not isinstance(actor, int):
                acted = actor.serve_one(self.top.apply if actor is self.local else actor.center.apply)
            elif acted := waits[actor] is None or waits[actor].test():
                try:
                    waits[actor] = next(loops[actor])
                except StopIteration:
                    del waits[actor]
            idle = 0 if acted else idle + 1
            assert idle < 10_000, "nobody can act"
            after()
        return taken

    @staticmethod
    def loop(worker, gradient, taken, most):
        """A worker's session: yields the handles that it waits for, and None after each step."""
        yield from worker.waits_to_begin()
        while (most is None or len(taken) < most) and (yield from worker.waits_for_work()):
            taken.append(worker.held.number)
            worker.local_step(gradient(worker, taken[-1]), float(taken[-1]))
            yield None
            yield from worker.waits_after_step()
        yield from worker.waits_to_leave()
        yield from worker.waits_to_settle()
