"""The center of a run in situ: served beside a solver that computes, or by nobody; and a rank that only reads it."""

import threading
import time
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..arrays.kernels import run
from ..cluster.placement import fault_tolerant
from ..core.center import Center
from ..core.drive import Unblocking
from ..core.ends import Handle, WorkerEnd
from ..core.leases import Leases
from ..core.messages import LEAVE, REFUSED, STOP, Commit, Reply
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.rules import CommitInfo, Rule, Weight, agn, weighted
from ..core.worker import Worker
from ..transport.accumulate import AccumulateWorker
from ..transport.p2p import CENTER, P2PWorker
from ..transport.p2p_center import P2PCenter
from ..transport.windows import CLOCK, CONTROL
from .samples import Reservoir

Place: TypeAlias = Literal["solver", "rank", "thread", "none"]  # that serves it
_PATIENCE = 1 << 60  # refused commits in a row: a network that fails must not end the solver
_SHORT, _LONG = 5e-4, 5e-2  # seconds between two looks of a thread that serves, beside a solver that computes


class Members(NamedTuple):
    """Who takes part in a run, beside the center; by number, those that train come first.

    Args:
        train: their ranks.
        read: the ranks of those that do not.
        feed: of these, those that send samples.

    >>> Members.of(["trains", "feeds", "reads", "trains"], "solver")
    Members(train=(3, 0), read=(1, 2), feed=(1,))
    """

    train: tuple[int, ...]
    read: tuple[int, ...]
    feed: tuple[int, ...]

    @classmethod
    def of(cls, does: Sequence[str], place: Place) -> Self:
        """Of what each rank does. Raises ValueError where none trains, or rank 0 does not."""
        if does[0] != "trains":
            raise ValueError(f"rank 0 has the center: let another rank {does[0].removesuffix('s')}")
        ranks = [*range(1, len(does)), *([] if place == "rank" else [0])]
        train, read = (tuple(r for r in ranks if (does[r] == "trains") == trains) for trains in (True, False))
        if not train:
            raise ValueError("all ranks but the center's read or feed: one must train")
        return cls(train, read, tuple(r for r in read if does[r] == "feeds"))

    @property
    def ranks(self) -> tuple[int, ...]:
        """By number."""
        return self.train + self.read

    def number(self, rank: int) -> int:
        """Of a rank."""
        return self.ranks.index(rank)


class Served(Observer):
    """The center at rank 0, served inside the calls of the solver, or by a thread.

    Attributes:
        patient: whether that thread may look at messages seldom, since a solver computes; not at first.
    """

    patient = False

    def __init__(
        self, comm: MPI.Comm, rule: Rule, x: Array, period: int, place: Place, steps: int | None, members: Members
    ) -> None:
        self._members, trains = members, place != "rank"
        self._training = set(range(len(members.train)))  # workers that have neither left nor died
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
            text = "MPI was not initialized with MPI_THREAD_MULTIPLE: rank 0 serves the center inside learn and done"
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
        """Each look takes time from the solver on the same core: after a message soon, then ever later."""
        pause, seen = _SHORT, 0
        try:
            while self.end.live:
                served = self.end.serve_one(self.center.apply)
                if served or seen != (seen := self.end.progress):
                    pause = _SHORT
                if not served:
                    time.sleep(pause)
                    pause = min(2 * pause, _LONG if self.patient else _SHORT)
        except BaseException as error:  # raised again where the solver calls
            self._error = error

    def served(self, commit: Commit, reply: Reply) -> None:
        """Warn, once: a network that fails must not end the solver, but be known. Tell readers when nobody trains."""
        if commit.requests & LEAVE:
            self._gone(commit.worker)
        if reply.status == REFUSED and self.center.refused == 1:
            rank = self._members.ranks[commit.worker]
            warnings.warn(_says_it_fails(rank), RuntimeWarning, stacklevel=2)

    def _gone(self, worker: int) -> None:
        self._training.discard(worker)
        if not self._training:
            self.center.control = STOP

    def _worker_lost(self, worker: int) -> None:
        self.center.worker_lost(worker)
        self._gone(worker)
        warnings.warn(f"rank {self._members.ranks[worker]} is lost; the others go on", RuntimeWarning, stacklevel=2)


class Summing(AccumulateWorker):
    """The end of a rank of a run whose center nobody serves: those that train sum into it, and weigh what they add.

    Args:
        comm: ours; the center lies at its rank 0.
        x: (n,) what it begins with.
        members: who trains, and who reads.
        reservoir: of this rank's own samples.
    """

    # Its counters are the numbers of posted messages, of which this transport has none.
    _LEFT, _SAMPLES, _TELLING = range(3)  # who trained and has left; samples that were told of, and by how many ranks
    patience = _PATIENCE

    def __init__(self, comm: MPI.Comm, x: Array, members: Members, reservoir: Reservoir) -> None:
        super().__init__(comm, x, number=members.number(comm.rank))
        self._trainers, self._rank, self._reservoir = len(members.train), comm.rank, reservoir
        self._told = self._clock = 0  # samples; of the center at the last pull
        self._has_failed = False
        if comm.rank == 0 and not self.windows.shared:
            text = "MPI's windows are no memory that these ranks share: a commit waits until rank 0 enters MPI"
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    def rule(self, weight: Weight) -> Rule:
        """AGN whose commits are weighed before they are added: w(x − o)/k."""

        def delta(x: Array, o: Array, _a: Array, k: int, out: Array) -> bool | None:
            return run("delta", [x, o], [k / weight(self._info(k))], [out])

        return agn()._replace(delta=delta)

    def _info(self, steps: int) -> CommitInfo:
        """Of a commit of so many steps, as a center that serves would know it; tells the others of new samples."""
        new, first, self._told = self._reservoir.seen - self._told, not self._told, self._reservoir.seen
        samples, telling = self._add_to(self._SAMPLES, new) + new, self._add_to(self._TELLING, first) + first
        staleness = self.windows.read(CLOCK) - self._clock
        return CommitInfo(staleness, 1, steps, self._trainers, telling * self._told / samples / self._trainers)

    def _add_to(self, counter: int, value: int) -> int:
        return self.windows.add(self.windows.posted + counter, value)

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        """As `AccumulateWorker.exchange`; warns, once, of a network that fails: it must not end the solver."""
        handle = super().exchange(commit, out)
        reply = handle.wait()
        if out is not None:
            self._clock = reply.clock
        if reply.status == REFUSED and not self._has_failed:
            self._has_failed = True
            warnings.warn(_says_it_fails(self._rank), RuntimeWarning, stacklevel=2)
        return handle

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """As `AccumulateWorker.leave`; tells those that read when nobody trains."""
        handle = super().leave(commit, out)
        if self.worker < self._trainers and self._add_to(self._LEFT, 1) + 1 == self._trainers:
            self.windows.add(CONTROL, STOP, MPI.REPLACE)
        return handle


def _says_it_fails(rank: int) -> str:
    return f"rank {rank} has sent NaN or infinity: refused, as are all such commits; lower the rate"


class Reader:
    """Pulls when told, and never waits.

    Args:
        end: its end.
        x: (n,) like the center.
        number: of its end.

    >>> from agnmpi.core import rules
    >>> from agnmpi.core.center import Center
    >>> from agnmpi.transport.local import LocalCenter
    >>> center = Center(rules.agn(), np.zeros(1), workers=1)
    >>> local = LocalCenter(np.ones(1), 2, center.apply)
    >>> reader = Reader(local.worker_end(1), np.zeros(1))
    >>> reader.poll()  # the center has not answered yet
    False
    >>> local.serve_one(center.apply), reader.poll(), reader.o
    (True, True, array([1.]))
    """

    def __init__(self, end: WorkerEnd, x: Array, number: int = 0) -> None:
        self.o = x.copy()  # the center, as it was pulled last
        self.last_reply: Reply | None = None  # to that pull
        self.pulls = 0  # centers that have arrived
        self.done = False  # nobody trains any more, as of the last reply
        self.left = False  # all workers have left, and it has the final center
        self._end, self._number, self._arriving = end, number, np.empty_like(x)
        self._wants_center = self._leaving = self._looking = False
        self._handle: Handle | None = end.pull(self._arriving)

    def pull(self) -> None:
        """Ask for the center, as soon as no request is under way."""
        self._wants_center = True
        self._ask()

    def look(self) -> None:
        """Ask whether anybody trains, unless a request is under way; a message without the center."""
        self._looking |= self._handle is None
        self._ask()

    def _ask(self) -> None:
        if self._handle is None and not self.left and self._wants_center:
            self._wants_center = self._looking = False
            self._handle = self._end.pull(self._arriving)
        elif self._handle is None and not self.left:
            self._handle = self._end.exchange(Commit(self._number), None)

    def poll(self) -> bool:
        """Make progress without blocking; whether a center has arrived."""
        if self._handle is None or not self._handle.test():
            return False
        reply, self._handle = self._handle.wait(), None
        self.done |= reply.control == STOP
        if self._looking:
            self._looking = False
            return False
        self.last_reply, self.pulls = reply, self.pulls + 1
        self.o, self._arriving = self._arriving, self.o
        self.left = self._leaving
        return True

    def leave(self) -> None:
        """Leave, once no request is under way: to be called until it has `left`."""
        self.poll()
        if self._handle is None and not self._leaving:
            self._leaving, self._handle = True, self._end.leave(None, self._arriving)


def parts(
    comm: MPI.Intracomm, members: Members, x: Array, weight: Weight, optimizer: Optimizer, period: int, center: Place,
    steps: int | None, reservoir: Reservoir,
) -> tuple[Served | None, WorkerEnd | None, Unblocking | None, Reader | None]:  # fmt: skip
    """What this rank has: the center, an end, and with that a worker, or what reads; rank 0 may have the center, too.

    Where nobody serves, each rank has an end.
    """
    if center == "none":
        summing = Summing(comm, x, members, reservoir)
        summing.begin(steps, period, Leases(steps, period))
        served, rule = None, summing.rule(weight)
        end: WorkerEnd = summing
    else:
        rule = weighted(agn(), weight)
        served = Served(comm, rule, x, period, center, steps, members) if comm.rank == CENTER else None
        if comm.rank not in members.ranks:
            return served, None, None, None
        end = P2PWorker(comm, number=members.number(comm.rank))
    if comm.rank in members.read:
        return served, end, None, Reader(end, x, members.number(comm.rank))
    worker = Worker(x, rule, optimizer, end, members.number(comm.rank), overlap=center != "none", wait=center == "none")
    worker.total = steps
    return served, end, Unblocking(worker), None
