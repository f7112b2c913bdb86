"""The center of a run in situ: served beside a solver that computes, or by nobody; and who trains, or only reads it."""

import threading
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..arrays.kernels import run
from ..cluster.placement import fault_tolerant
from ..core.center import Center
from ..core.drive import Unblocking
from ..core.ends import Done, Handle, Polled, Waits, WorkerEnd, awaited
from ..core.leases import NONE, Lease, Leases
from ..core.messages import IDLE, LEAVE, REFUSED, STOP, WAIT, WORK, Commit, Reply
from ..core.observer import Observer
from ..core.optimizers import Optimizer
from ..core.rules import CommitInfo, Rule, Weight, agn, weighted
from ..core.worker import Worker
from ..transport.accumulate import AccumulateWorker
from ..transport.p2p import CENTER, P2PWorker
from ..transport.p2p_center import P2PCenter
from ..transport.windows import CLOCK, CONTROL, GIVEN_UP, STEPS
from .samples import Reservoir

Place: TypeAlias = Literal["solver", "rank", "thread", "none"]  # that serves it
_PATIENCE = 1 << 60  # refused commits in a row: a network that fails must not end the solver
RESTS_AFTER = 2.0  # seconds without a step after which a rank gives back what it holds, at first
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
        while self._thread is None and self.end.live and self.end.serve_one(self._apply):
            pass

    def _apply(self, commit: Commit, c: Array) -> Reply | None:
        """As `Center.apply`; tells those that train and ask for nothing when all steps are taken."""
        reply, leases = self.center.apply(commit, c), self.center.leases
        if reply is None or leases is None or commit.requests & (WORK | LEAVE) or commit.worker not in self._training:
            return reply
        open_ = leases.left != 0 or leases.held or leases.free
        return reply if open_ else reply._replace(control=STOP)

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
                served = self.end.serve_one(self._apply)
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

    The header of a rank, which no center reads here, is a word: the first step of a lease that it has given back, and
    1; or 0. A rank has none there while it holds one, so that one word is enough.

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
        """As `AccumulateWorker.exchange`; warns, once, of a network that fails: it must not end the solver.

        Leases that were given back are granted to those that ask, and wait, for work: until all steps are taken.
        """
        asks = commit.requests & WORK and commit.requests & IDLE
        returned = self._take_returned() if asks else NONE
        handle = super().exchange(commit._replace(requests=0) if returned.steps else commit, out)
        reply = handle.wait()
        if out is not None:
            self._clock = reply.clock
        if reply.status == REFUSED and not self._has_failed:
            self._has_failed = True
            warnings.warn(_says_it_fails(self._rank), RuntimeWarning, stacklevel=2)
        if commit.requests & IDLE and not asks:
            self._give_back()
        if returned.steps:
            return Done(reply._replace(work=returned))
        if reply.work.steps or reply.control == STOP or self.worker >= self._trainers:
            return handle
        if asks:
            return Polled(partial(self._find_work, reply))
        control = STOP if self._all_taken else WAIT if commit.requests & WORK else reply.control
        return Done(reply._replace(control=control))

    def _find_work(self, reply: Reply, _blocking: bool) -> Reply | None:
        if (lease := self._take_returned()).steps:
            return reply._replace(work=lease)
        return reply._replace(control=STOP) if self._all_taken else None

    @property
    def _all_taken(self) -> bool:
        total = self._division.total
        return total is not None and self.windows.read(STEPS) + self.windows.read(GIVEN_UP) >= total

    def _give_back(self) -> None:
        for lease in self._held:
            self.windows.add(self.windows.header(self.worker), lease.first + 1, MPI.REPLACE)
        self._held.clear()

    def _take_returned(self) -> Lease:
        """Hold a lease that was given back, this rank's own before others'; `NONE` if there is none."""
        for i in range(self._trainers):
            word = self.windows.header((self.worker + i) % self._trainers)
            if self.windows.read(word) and (kept := self.windows.add(word, 0, MPI.REPLACE)):
                whole = self._division.lease((kept - 1) // self._division.period)
                self._held.append(Lease(kept - 1, whole.end - (kept - 1)))
                return self._held[-1]
        return NONE

    def _show_held(self) -> None:
        """Nobody asks."""

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        """As `AccumulateWorker.leave`; gives back what is held, and tells those that read when nobody trains."""
        if commit is not None:
            self.exchange(commit, None)
        self._give_back()
        handle = super().leave(None, out)
        if self.worker < self._trainers and self._add_to(self._LEFT, 1) + 1 == self._trainers:
            self.windows.add(CONTROL, STOP, MPI.REPLACE)
        return handle


def _says_it_fails(rank: int) -> str:
    return f"rank {rank} has sent NaN or infinity: refused, as are all such commits; lower the rate"


class Resting(Worker):
    """A worker that gives back the steps that it does not take, and asks for others once it can take one.

    Attributes:
        ready: its caller takes a step now, if one is granted.
        rests: it takes none for long: those done are to be committed, the others given back.
        leaves: it is to leave.
    """

    ready = rests = leaves = False
    _looks = False  # it is to ask whether all steps are taken
    _since: float | None = None  # when there is a step to take
    _rested = 0  # times

    def look(self) -> None:
        """Between two time steps of the caller: find out whether all steps are taken, and rest when it is time.

        Twice as late the next time: it may be slow, not idle.
        """
        self._looks = self.total is not None
        if self._looks and self._since is not None and time.monotonic() - self._since > RESTS_AFTER * 2**self._rested:
            self.rests, self._rested = True, self._rested + 1

    def waits_for_work(self) -> Waits[bool]:
        """As `Worker.waits_for_work`, and until the caller takes the step."""
        while (yield from super().waits_for_work()):
            self._since = time.monotonic()
            yield from awaited(Polled(lambda _: self._told(self.ready or self.rests)))
            self._since = None
            if not self.rests:
                return True
            yield from self._rest()
        return False

    def _told(self, what: bool) -> Reply | None:
        return Reply(0) if what or self.leaves else None

    def _wait_for_work(self) -> Waits[None]:
        self.rests = False
        yield from awaited(Polled(lambda _: self._told(self.ready or self._looks)))
        if self.leaves:
            self._work_may_come = False
        elif self.ready:
            yield from super()._wait_for_work()
        else:
            self._looks = False
            reply = yield from awaited(self.end.exchange(Commit(self.index), None))
            self._work_may_come = reply.control != STOP

    def _rest(self) -> Waits[None]:
        self.rests = False
        if self._handle is not None:
            yield from self._finish_exchange()
        if self.held.done:
            self._commit = self._form_commit(IDLE)
            if self.overlap:
                self._buffers.sent[...] = self.x
            self._handle = self.end.exchange(self._commit, self._buffers.pulled)
            yield from self._finish_exchange()
        else:
            yield from awaited(self.end.exchange(Commit(self.index, requests=IDLE), None))
        self.held.leases.clear()
        self._work_may_come = True


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
    served_by, number = center != "none", members.number(comm.rank)
    worker = Resting(x, rule, optimizer, end, number, overlap=served_by, wait=not served_by)
    worker.total = steps
    return served, end, Unblocking(worker), None
