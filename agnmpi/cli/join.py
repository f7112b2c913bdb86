"""`join`, also `agnmpi.join`: the ranks of this mpiexec become workers of a job that runs."""

import socket
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

from mpi4py import MPI

from ..cluster.connect import Connector
from ..cluster.door import described, knock, watch_center
from ..cluster.machine import limit_blas
from ..cluster.placement import place
from ..cluster.probe import choose_wire
from ..cluster.setup import Setup
from ..core.drive import train
from ..core.worker import Worker
from ..recovery.watchdog import end_stranded
from ..training.config import load_run
from ..training.exits import Interrupted, Signals
from ..training.problem import Batches, Factory, data_of, gradient_of, leases_ahead, plan_of, prepare
from ..transport.agreement import raise_on_all


def join(
    run: str | Path,
    comm: MPI.Intracomm | None = None,
    signals: Signals | None = None,
    *,
    problem: Factory | None = None,
) -> None:
    """Train, on each rank, as one more worker of a run with `joinable` in another mpiexec, up to its end; collective.

    The rank ends at once, with exit code 69, if that run's center dies.

    Args:
        run: its directory.
        comm: ranks that join. Default: all.
        signals: signals at which this rank leaves: what it has not committed goes to the others; default: none.
        problem: the run's class. Default: found by the name that the run knows it by.

    Raises:
        ConfigError: on all ranks, if one is not let in.
        Interrupted: one of `signals` has come.
    """
    directory, world, signals = Path(run), comm or MPI.COMM_WORLD, signals or Signals(lambda _code: None)
    config = raise_on_all(world, lambda: load_run(directory).complete())
    here = place(world, trains=True)
    limit_blas(here.threads)
    load = partial(prepare, config.problem, config.options, config.seed, config.device, here.worker_index, problem)
    made, layout, x = raise_on_all(world, load)
    plan = raise_on_all(world, lambda: plan_of(made, config))
    wire = choose_wire(world, x, config.make_transport())
    center, facts, connection = raise_on_all(world, lambda: knock(directory, described(layout, data_of(plan, config))))
    over = threading.Event()
    watch_center(connection, over, partial(end_stranded, world.rank))
    print(f"agnmpi: rank {world.rank} has joined {directory}, as worker {facts['number']}", file=sys.stderr, flush=True)

    transport = replace(config.make_transport(), numbers=(facts["number"],), wire=wire)
    setup = Setup(transport, config.overlap, caller_uses_mpi=False, wait=config.wait)
    connector = Connector(config.make_rule(), config.make_optimizer(plan.steps), setup=setup)
    end = connector.threaded(connector.encoded(connector.worker_end(center, x), x), x)
    worker = Worker(x, connector.rule, connector.optimizer, end, facts["number"], setup.overlap, wait=setup.wait)
    worker.total, worker.session = facts["total"], facts["session"]
    worker.ahead = leases_ahead(made, connector.rule, False)

    batches = Batches(made, plan, x, lambda: worker.held.numbers, config.period)
    gradient = gradient_of(made, layout, plan, x, batches=batches)
    try:
        for _ in train(worker, gradient):
            if signals.received:
                raise Interrupted(abort=False)
        worker.settle()
    except BaseException:  # what it has not committed goes to the others
        connection.shutdown(socket.SHUT_RDWR)
        raise
    finally:
        over.set()
        batches.close()
