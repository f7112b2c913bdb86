"""What a loop of your own says: of ranks that are missing, lost or fail, of steps not taken; and advice."""

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mpi4py import MPI

from ..cluster.placement import fault_tolerant
from ..cluster.roles import CenterRole, NodeRole
from ..core.leases import Lease
from ..core.messages import STOP, Commit, Reply
from ..core.observer import Observer
from ..core.rules import Rule
from ..recovery.silent_workers import SilentWorkers
from ..reporting.advice import advice
from ..training.session import Session
from ..transport.agreement import format_ranks

WAIT = 30.0  # seconds after which a rank that waits for others to begin says so, once a session
SILENCE = 60.0, 10.0  # a worker is named after so many seconds, and so many times the longest silence before


class Warner(Observer):
    """Warns on one rank of what befalls the sessions of a loop.

    Args:
        name: of the optimizer, in messages.
    """

    session: Session  # of the loop

    def __init__(self, name: str) -> None:
        self._name = name
        self._met = set[int]()  # workers that have begun this session
        self._silent: SilentWorkers | None = None

    def _say(self, line: str) -> None:
        """Warn, or log what is no warning."""
        text = line.removeprefix("WARNING: ")
        if text != line:
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)
        else:
            logging.getLogger("agnmpi").info("%s: %s", self._name, text)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """While in it: say once if others, after `WAIT` seconds, have not begun, or have committed nothing."""
        timer = threading.Timer(WAIT, self._say_who_is_missing, [self._heard])
        timer.daemon = True
        timer.start()
        self._watch_workers()
        try:
            yield
        finally:
            timer.cancel()
            self._silent = None

    def _watch_workers(self) -> None:
        """Where this rank serves them: name workers that send nothing for too long."""
        session, role, (least, patience) = self.session, self.session.role, SILENCE
        if isinstance(role, CenterRole) and session.single_commits and (not session.rank or isinstance(role, NodeRole)):
            name = "rank {}".format
            self._silent = SilentWorkers(role, session.members, least, False, name, self._say, patience)

    @property
    def _heard(self) -> int:
        """Of the others: commits, or the pulls of a worker."""
        role = self.session.role
        return role.center.clock if role.serves else role.workers[0].pulls

    def _say_who_is_missing(self, heard: int) -> None:
        session, role = self.session, self.session.role
        if isinstance(role, CenterRole):
            says = not session.rank or isinstance(role, NodeRole)
            here = {*self._met, *role.end.spares}
            late = [session.members.rank_of(worker) for worker in role.numbers if worker not in here]
            who = f"{format_ranks(late)} {'are' if len(late) > 1 else 'is'} not" if late and says else ""
        elif self._heard > heard or role.workers[0].spare:
            who = ""
        else:
            who = "not every rank is" if session.rule.allreduce else f"rank {session.members.serving[0]} is not"
        if who:
            text = f"rank {session.rank} has waited for {WAIT:g} s: {who} in steps(): every rank must run the loop"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)
        elif role.serves and session.rank == 0 and self._heard == heard and session.single_commits:
            text = (
                f"no worker has committed anything in the first {WAIT:g} s. Rank 0 serves: should they wait for it, in "
                "a collective call of a solver, give a communicator without it, or use agnmpi.insitu"
            )
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def _failed_at_center(self, error: str) -> None:
        warnings.warn(
            f"{self._name}: at_center has failed, and training goes on:\n{error}", RuntimeWarning, stacklevel=2
        )

    def _report(self, total: int | None, taken: int, dropped: int) -> None:
        """Warn, at the end of a loop, of steps that were not taken."""
        role, rank = self.session.role, self.session.rank
        short = total is not None and taken < total and role.center.control != STOP
        if role.serves and rank == 0 and short:
            text = f"{taken} of {total} steps were taken: the workers left before the end"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=3)
        if self.session.rule.allreduce and short:
            raise RuntimeError(
                f"{self._name}: another rank left the loop after {taken} of {total} steps, by break or "
                f"by an exception, and rule {self.session.rule.name} needs all ranks; use steps() to end early"
            )
        if dropped:
            text = f"{dropped} steps of rank {rank} were dropped: another rank broke off meanwhile"
            warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=3)

    def served(self, commit: Commit, _reply: Reply) -> None:
        """This worker has begun."""
        self._met.add(commit.worker)
        if self._silent is not None:
            self._silent.served(commit)

    def waiting(self) -> None:
        """Look who is silent."""
        if self._silent is not None:
            self._silent.tick()

    def _note(self, event: str, **facts: Any) -> None:
        """An event to be written."""

    def lost(self, rank: int, held: Sequence[Lease]) -> None:
        """Warn."""
        self._note("lost", rank=rank, uncommitted=held, workers=self.session.role.at_work)
        self._warn_of_loss(f"rank {rank} is lost; what it had not committed goes to the others")

    def joined(self, rank: int) -> None:
        """Note a spare that takes a lost rank's place."""
        self._note("joined", rank=rank, workers=self.session.role.at_work)

    def left_behind(self, ranks: Sequence[int]) -> None:
        """Warn; at the center."""
        if ranks and self.session.role.serves:
            self._warn_of_loss(f"{format_ranks(list(ranks))} did not answer at the end, and the others went on")

    def given_up(self, lease: Lease) -> None:
        """Warn."""
        self._note("given_up", first=lease.first, steps=lease.steps)
        last = lease.first + lease.steps - 1
        text = f"the commits of steps {lease.first} to {last} were refused repeatedly: they are given up"
        warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def failing(self, worker: int, refusals: int) -> None:
        """Warn."""
        session = self.session
        rank = session.members.rank_of(worker) if session.role.serves else session.rank
        self._note("failing", rank=rank, refusals=refusals)
        self._warn_of_failing(rank, refusals, "It tries again")

    def _warn_of_failing(self, rank: int, refusals: int, then: str) -> None:
        text = (
            f"the last {refusals} commits of rank {rank} were refused: NaN or infinity. {then}, and the others "
            "go on; if moments of its optimizer are not finite, set them to 0 in on_refused"
        )
        warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=2)

    def new_center(self, source: str, _newly_lost: Sequence[int]) -> None:
        """Warn; on every rank."""
        change = f"ranks {sorted(self.session.members.lost)} are lost, the center among them"
        if self.session.comm.rank == 0:
            change += f"; this rank {'serves' if self.session.role.serves else 'trains'} on, from {source}"
            self._watch_workers()
        self._warn_of_loss(change)

    def _warn_of_loss(self, change: str) -> None:
        text = (
            f"{self._name}: {change}. MPI cannot be finalized any more (Open MPI 5.0 hangs there): when all is done, "
            "end each rank by os._exit, after a barrier on the `comm` of this optimizer"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def warn_of_threads(name: str) -> None:
    """Under MPI_THREAD_MULTIPLE Open MPI 5.0's btl/tcp deadlocks when a peer dies during a large message."""
    if fault_tolerant() and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        warnings.warn(
            f"{name}: MPI runs fault tolerant and with MPI_THREAD_MULTIPLE, under which Open MPI may hang when a "
            'rank dies; set MPI4PY_RC_THREAD_LEVEL=funneled, or mpi4py.rc.thread_level = "funneled" before the '
            "import of MPI",
            RuntimeWarning,
            stacklevel=3,
        )


def advise(name: str, rule: Rule, workers: int, period: int, adds: bool) -> None:
    """Log the advice about n/λ: what is only slow as information, which Python does not show by default."""
    for line in advice(rule, workers, period, adds):
        text = line.removeprefix("WARNING: ")
        logging.getLogger("agnmpi").log(logging.INFO if text == line else logging.WARNING, "%s: %s", name, text)
