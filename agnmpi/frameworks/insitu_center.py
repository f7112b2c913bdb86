"""The center of a run in situ: served beside a solver that computes."""

import threading
import warnings
from typing import Literal, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.placement import fault_tolerant
from ..core.backoff import set_pace
from ..core.center import Center, serve
from ..core.leases import Leases
from ..core.messages import REFUSED, Commit, Reply
from ..core.observer import Observer
from ..core.rules import Rule
from ..transport.p2p_center import P2PCenter

Place: TypeAlias = Literal["solver", "rank", "thread"]  # that serves it
_PATIENCE = 1 << 60  # refused commits in a row: a network that fails must not end the solver
_CAP, _SPIN = 5e-3, 0.0  # seconds: how a thread that serves waits, beside a solver that computes


class Served(Observer):
    """The center at rank 0, served inside the calls of the solver, or by a thread."""

    def __init__(self, comm: MPI.Comm, rule: Rule, x: Array, period: int, place: Place, steps: int | None) -> None:
        trains = place != "rank"
        workers, self._size = comm.size - (not trains), comm.size
        self.center = Center(rule, x, workers, patience=_PATIENCE, observer=self)
        # As many buffers as workers: one whose solver does not call for long keeps its own.
        self.end = P2PCenter(comm, x.copy(), comm.size, trains=trains)
        self.center.leases, self.center.on_block = Leases(steps, period), self.end.move_on
        self.center.idle_workers_wait = True
        if fault_tolerant():
            self.end.on_loss = self._worker_lost
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.end.open()
        if place == "thread" and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._thread = threading.Thread(target=self._serve, name="agnmpi center", daemon=True)
            self._thread.start()
        elif place == "thread":
            text = (
                "MPI was not initialized with MPI_THREAD_MULTIPLE: rank 0 serves the center inside put, learn and done"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def poll(self) -> None:
        """Serve what has arrived, if no thread does; raises what has ended the thread."""
        if self._error is not None:
            raise self._error
        while self._thread is None and self.end.live and self.end.serve_one(self.center.apply):
            pass

    def join(self) -> None:
        """When all have left: wait for the thread."""
        if self._thread is not None:
            self._thread.join()
            self.poll()

    def _serve(self) -> None:
        set_pace(_CAP, _SPIN)
        try:
            serve(self.end, self.center.apply)
        except BaseException as error:  # raised again where the solver calls
            self._error = error

    def served(self, commit: Commit, reply: Reply) -> None:
        """Warn, once: a network that fails must not end the solver, but be known."""
        if reply.status == REFUSED and self.center.refused == 1:
            rank = (commit.worker + 1) % self._size
            text = f"rank {rank} has sent NaN or infinity: refused, as are all such commits; lower the rate"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _worker_lost(self, worker: int) -> None:
        self.center.worker_lost(worker)
        warnings.warn(f"rank {(worker + 1) % self._size} is lost; the others go on", RuntimeWarning, stacklevel=2)
