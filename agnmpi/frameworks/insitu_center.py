"""The center of a run in situ: served beside a solver that computes."""

import threading
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.placement import fault_tolerant
from ..core.backoff import set_pace
from ..core.center import Center, serve
from ..core.leases import Leases
from ..core.messages import REFUSED, STOP, Commit, Reply
from ..core.observer import Observer
from ..core.rules import Rule
from ..transport.p2p_center import P2PCenter

Place: TypeAlias = Literal["solver", "rank", "thread"]  # that serves it
_PATIENCE = 1 << 60  # refused commits in a row: a network that fails must not end the solver
_CAP, _SPIN = 5e-3, 0.0  # seconds: how a thread that serves waits, beside a solver that computes


class Members(NamedTuple):
    """Who takes part in a run, beside the center; by number, those that train come first.

    Args:
        train: their ranks.
        read: the ranks of those that read alone.

    >>> Members.of([False, False, True, False], "solver")
    Members(train=(1, 3, 0), read=(2,))
    """

    train: tuple[int, ...]
    read: tuple[int, ...]

    @classmethod
    def of(cls, reads: Sequence[bool], place: Place) -> Self:
        """Of what each rank does. Raises ValueError where none trains, or rank 0 reads."""
        if reads[0]:
            raise ValueError("rank 0 has the center: let another rank read")
        trains = [*range(1, len(reads)), *([] if place == "rank" else [0])]
        members = cls(tuple(r for r in trains if not reads[r]), tuple(r for r in trains if reads[r]))
        if not members.train:
            raise ValueError("all ranks but the center's read: one must train")
        return members

    @property
    def ranks(self) -> tuple[int, ...]:
        """By number."""
        return self.train + self.read

    def number(self, rank: int) -> int:
        """Of a rank."""
        return self.ranks.index(rank)


class Served(Observer):
    """The center at rank 0, served inside the calls of the solver, or by a thread."""

    def __init__(
        self, comm: MPI.Comm, rule: Rule, x: Array, period: int, place: Place, steps: int | None, members: Members
    ) -> None:
        self._members, trains = members, place != "rank"
        self.center = Center(rule, x, len(members.train), patience=_PATIENCE, observer=self)
        # As many buffers as workers: one whose solver does not call for long keeps its own.
        numbers = [members.number(rank) for rank in [*range(1, comm.size), *([0] if trains else [])]]
        self.end = P2PCenter(comm, x.copy(), comm.size, numbers=numbers, trains=trains)
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
        """Warn, once: a network that fails must not end the solver, but be known. Tell readers when nobody trains."""
        if self.end.live <= len(self._members.read):
            self.center.control = STOP
        if reply.status == REFUSED and self.center.refused == 1:
            rank = self._members.ranks[commit.worker]
            text = f"rank {rank} has sent NaN or infinity: refused, as are all such commits; lower the rate"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _worker_lost(self, worker: int) -> None:
        self.center.worker_lost(worker)
        warnings.warn(f"rank {self._members.ranks[worker]} is lost; the others go on", RuntimeWarning, stacklevel=2)
