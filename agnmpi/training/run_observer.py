"""What a rank makes of the events of its session: its duties beside serving, what it says, and what it writes."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.door import Door, described
from ..cluster.placement import leave_without_finalize
from ..cluster.roles import CenterRole
from ..cluster.setup import Setup
from ..core.leases import Lease
from ..core.messages import STOP, Commit, Reply
from ..core.observer import Observer
from .duties import Duties, Run
from .exits import Signals
from .fault_injection import Injection
from .monitor import Monitor
from .outputs import introduction
from .session import Session


class RunObserver(Observer):
    """Observes the session of a rank in a run of `agnmpi train`.

    Args:
        rank: this one, as at the beginning.
        hosts: of all ranks.
        signals: that ask the run to stop.
        injection: of faults, for tests.
    """

    session: Session  # once it is set up

    def __init__(self, rank: int, hosts: Sequence[str], signals: Signals, injection: Injection) -> None:
        self.duties: Duties | None = None  # at a rank that serves, or rank 0
        self._rank, self.hosts, self._signals, self._injection = rank, hosts, signals, injection
        self._run: Run
        self._began = 0.0  # start time, less the duration before a resume
        self._door: Door | None = None  # where workers of another job come in
        self._failure: RuntimeError | None = None  # of all commits

    def begin(
        self,
        run: Run,
        setup: Setup,
        resumed: Mapping[str, Any] | None,
        announcements: Sequence[str],
        threads: Sequence[int],
    ) -> None:
        """Take up the duties of this rank, if it has any, where a run begins or goes on.

        Args:
            run: the run.
            setup: how its ranks exchange.
            resumed: facts of the checkpoint that it goes on from, if any.
            announcements: lines to display at rank 0 after the introduction.
            threads: BLAS threads of each rank, where they are recorded.

        Raises:
            OSError: the run's files cannot be opened.
        """
        role, seconds = self.session.role, float(resumed["seconds"]) if resumed else 0.0
        self._run, self._began = run, time.monotonic() - seconds
        if self._rank == 0:
            size = len(self.hosts)
            lines = introduction(run.config, run.layout, run.plan, role, size, setup, self.name)
            self.duties = Duties(run, begins=([*lines, *announcements], threads[-role.count :]))
            if resumed is not None:
                self.duties.monitor.resume(int(resumed["samples"]), seconds)
        elif role.serves:
            self.duties = Duties(run, first=False)
        if run.config.joinable:
            leave_without_finalize()
        if run.config.joinable and isinstance(role, CenterRole):
            facts = {"total": role.total, "session": role.session}
            self._door = Door(run.directory, described(run.layout, run.data), facts, self._admit, role.end.bury)
            role.end.while_waiting = self._door.notice  # what is sent to the dead never arrives

    def _admit(self, comm: MPI.Comm, host: str) -> int:
        """A worker of another job has come in; returns its number."""
        number = self.session.admit(comm)
        rank = self.session.members.rank_of(number)
        self.hosts = [*self.hosts[:rank], host]
        self.say(f"{self.name(rank)} has joined, at step {self.session.role.center.steps}")
        self.note("joined", rank=rank, host=host, workers=self.session.role.at_work)
        return number

    @property
    def monitor(self) -> Monitor | None:
        """The display and the events, on the rank that has them."""
        return self.duties.monitor if self.duties is not None and self.duties.first else None

    def committed(self, commit: Commit, c: Array) -> None:
        """Count, display, evaluate and save."""
        if self.duties is None:
            return
        self.duties.committed(commit, c)
        if self.session.role.serves and self.duties.first:
            self._injection.step()

    def served(self, commit: Commit, reply: Reply) -> None:
        """Record; the worker is alive."""
        if self.duties is not None:
            self.duties.served(commit, reply)

    def waiting(self) -> None:
        """Update display and checkpoints; check for signals and silent workers."""
        if self.duties is not None:
            self.duties.tick(self._signals.received)
        if self._door is not None:
            self._door.look()

    def left(self) -> None:
        """Save before ranks are left behind."""
        if self._door is not None:
            self._door.close()
            self._door = None
        if self.duties is not None and (self._run.config.drop_stalled or self._run.config.spares):
            self.duties.save()  # Open MPI 5.0 may crash if a rank dies while others are left behind

    def lost(self, rank: int, held: Sequence[Lease]) -> None:
        """Report a worker that has died."""
        role, lost = self.session.role, self.session.members.lost
        others = sum(worker not in lost for worker in self.session.members.workers())
        self.say(
            f"WARNING: {self.name(rank)} is lost, at step {role.center.steps}; what it had not committed goes to the "
            f"{min(others, role.count - 1)} others"
        )
        self.note("lost", rank=rank, host=self.hosts[rank], uncommitted=held, workers=role.at_work)

    def guest_lost(self, rank: int, held: Sequence[Lease]) -> None:
        """Report a worker of another job that has gone."""
        self.say(f"WARNING: {self.name(rank)}, which had joined, has gone; others take what it had not committed")
        self.note("lost", rank=rank, host=self.hosts[rank], uncommitted=held, workers=self.session.role.at_work)

    def joined(self, rank: int) -> None:
        """Report a spare that takes a lost rank's place."""
        self.say(f"{self.name(rank)}, a spare, takes a lost rank's place")
        self.note("joined", rank=rank, host=self.hosts[rank], workers=self.session.role.at_work)

    def diverged(self, error: RuntimeError) -> None:
        """Say so: what is good is saved before the run ends. With an allreduce rule all ranks raise it, in a round."""
        if self._failure is None:
            self._failure = error
            if self.duties is not None:
                self.say(f"WARNING: {error}")
        if self.session.rule.allreduce:
            raise error

    @property
    def failure(self) -> RuntimeError | None:
        """Why the run has failed, as this rank has seen, if it has: the first evaluation, or all commits."""
        if self.monitor is not None and self.monitor.failure:
            return RuntimeError(self.monitor.stop_reason)
        return self._failure

    @property
    def fell_short(self) -> str:
        """At the center: what is missing where workers have left although nobody has asked them to; "" if nothing."""
        center, total, session = self.session.role.center, self._run.plan.steps, self.session
        if session.comm.rank or session.deserted or center.control == STOP:
            return ""
        if center.settled < total:
            return f"the workers left after {center.settled} of {total} steps: their commits were refused"
        return "" if center.steps else f"none of {total} steps could be committed: they gave NaN or infinity"

    def given_up(self, lease: Lease) -> None:
        """Report steps that are given up."""
        last = lease.first + lease.steps - 1
        self.say(
            f"WARNING: steps {lease.first} to {last} gave NaN or infinity again and again, and are given up; look at "
            "their samples"
        )
        self.note("given_up", first=lease.first, steps=lease.steps)

    def failing(self, worker: int, refusals: int) -> None:
        """Name a worker whose commits are refused again and again."""
        if self.monitor is None:
            return
        rank = self.session.members.rank_of(worker) if self.session.role.serves else self._rank
        self.say(f"WARNING: the last {refusals} commits of {self.name(rank)} were refused: NaN or infinity")
        self.note("failing", rank=rank, refusals=refusals)

    def missing(self, ranks: Sequence[int]) -> None:
        """Report ranks that were lost after their work was done."""
        if self.session.role.serves:
            for rank in ranks:
                self.say(f"WARNING: {self.name(rank)} is lost, after its work was done")

    def left_behind(self, ranks: Sequence[int]) -> None:
        """Report ranks that do not answer at the end."""
        if self.session.role.serves:
            for rank in ranks:
                self.say(f"WARNING: {self.name(rank)} does not answer, and is left behind")

    def alone(self) -> None:
        """Report that no other rank is left."""
        self.say(f"WARNING: all workers are lost; rank {self._rank}, which was one, trains on alone")
        if self.duties is not None:
            self.duties.change_role(self.session.role)
        self.note("alone", workers=1)

    def new_center(self, source: str, newly_lost: Sequence[int]) -> None:
        """Another center has been elected; if it is this rank, it takes over the files and the display, too."""
        session = self.session
        if session.comm.rank:
            return
        role, center, leases = session.role, session.role.center, session.role.center.leases
        assert leases is not None
        self.duties = Duties(self._run)
        count = self._run.plan.count
        samples = count(Lease(0, leases.next)) - sum(map(count, leases.open()))
        self.duties.monitor.resume(samples, time.monotonic() - self._began)
        self.say(
            f"WARNING: {' and '.join(map(self.name, newly_lost))} {'is' if len(newly_lost) == 1 else 'are'} lost, "
            f"the center among them; {self.name(self._rank)} is the center now, from {source}, and goes on at step "
            f"{center.steps}, clock {center.clock}, " + (f"workers: {role.count}" if role.serves else "alone")
        )
        self.note(
            "failover", lost=sorted(session.members.lost), center=self._rank, begun_from=source, workers=role.count
        )

    def name(self, rank: int) -> str:
        """The rank and its host, as text."""
        return f"rank {rank} on {self.hosts[rank]}"

    def say(self, line: str) -> None:
        """Print a line: on the display where this rank has one."""
        if self.monitor is not None:
            self.monitor.say(line)
        else:
            print(f"agnmpi: rank {self._rank}: {line}", file=sys.stderr, flush=True)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event, if this rank writes events."""
        if self.monitor is not None:
            self.monitor.note(event, **facts)
