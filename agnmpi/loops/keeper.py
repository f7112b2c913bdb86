"""How a loop of your own is kept: when its checkpoints are written, how it is resumed, signals that ask for both."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..arrays.backend import Array, bring
from ..core.backoff import wait_until
from ..core.params import Layout
from ..core.worker import Phase
from ..recovery.checkpoint import read_caller, read_span
from ..recovery.restore import check_tensors, resume
from ..recovery.saver import workers_saved
from ..training.abort import abort
from ..training.exits import Interrupted, Signals
from ..training.session import Session
from ..transport.agreement import allgather
from .own_checkpoints import OwnCheckpoints
from .terms import Caller, Kept


class Keeper:
    """Keeps what a loop has done, on one rank.

    Args:
        session: of the loop.
        layout: of the parameters.
        kept: where checkpoints are kept; None: nowhere but by `save`, and signals are the caller's.
        facts: of the loop, for a checkpoint; called with whether that is between two sessions.
        say: called with each warning.
        nbytes: of a worker's state.
    """

    def __init__(
        self, session: Session, layout: Layout, kept: Kept | None, facts: Callable[[bool], Mapping[str, Any]],
        say: Callable[[str], None], nbytes: int,
    ) -> None:  # fmt: skip
        self._session, self._layout, self._facts, self._say = session, layout, facts, say
        self._kept, self._when = kept, "end"
        if kept is not None:
            self._when, choice = workers_saved(kept.workers, nbytes, session.role.count)
            if choice and any(worker.index == 0 for worker in session.role.workers):
                say(f"WARNING: {choice}")
        self._checkpoints = None if kept is None else self._set_up(kept)
        self.skip = 0  # loops that were complete when the run was resumed, and are still to come
        self._before = [0]  # steps before each session, also the next one
        self._resuming = False  # resumed, and none has begun since
        self._between = False  # what it was resumed from was saved between two sessions
        self._complete: int | None = None  # steps of the last loop, if it has taken or given up all that it was asked
        self.done_before = 0  # steps of the next session that were taken or given up before the run was resumed
        self._saved_at = -1  # steps at the last `save`
        self._failure = ""  # of this session
        self._signals = Signals(partial(abort, session.comm)) if kept else None

    @property
    def signalled(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signals is not None and bool(self._signals.received)

    @property
    def signal(self) -> str:
        """The signal that a rank got."""
        return (self._signals and self._signals.received) or "another rank's"

    def restore(self, directory: Path, required: bool, x: Array, caller: Caller) -> Mapping[str, Any] | None:
        """Continue from the newest checkpoint, with parameters `x` (n,); collective, before the first session.

        Returns its facts; None if there is none.
        """
        session, role = self._session, self._session.role
        run = (lambda: directory) if session.comm.rank == 0 else None
        facts = resume(session.comm, role, self._layout, None, {}, run, required, self._say)
        if facts is None:
            return None
        check_tensors(caller.tensors, facts, facts["checkpoint"])
        if self._checkpoints is not None and self._kept is not None:
            # Savers that were made before would take it for a new one, and write a later state into it.
            self._checkpoints.finish()
            self._checkpoints = self._set_up(self._kept)
        checkpoint = Path(facts["checkpoint"])
        self._before, self._resuming = [0, *map(int, facts.get("ends", []))], True
        self.skip = role.session = len(self._before) - 1
        self._complete, self._between = facts.get("complete"), bool(facts.get("between"))
        before = self._before[-1]
        if not facts.get("between"):
            self.done_before = int(facts["steps"]) - before + int((facts["leases"] or {}).get("given_up", 0))
        for worker in role.workers:
            worker.before = before
        if not role.serves and role.workers[0].phase is Phase.RESUMED:
            caller.restore(read_caller(checkpoint, role.workers[0].index))
        if role.serves and role.stores:
            x[...] = bring(read_span(checkpoint, facts, slice(None))["c"], x)
        caller.pulled()
        return facts

    @property
    def replayed(self) -> int | None:
        """Steps before the next loop of a resumed run, whose complete loops are gone through; None: one has begun."""
        return self._before[-1 - self.skip] if self._resuming else None

    def goes_on(self, total: int | None) -> bool:
        """Whether the last of the complete loops of a resumed run, asked for `total` steps now, has had fewer."""
        done, role = self._complete, self._session.role
        if self.skip or done is None or total is None or total <= done:
            return False
        steps, before = self._before.pop(), self._before[-1]
        role.reopen(done, given_up=done - (steps - before))
        self.done_before = done
        for worker in role.workers:
            worker.before = before
        return True

    @property
    def within(self) -> bool:
        """Whether a resumed run has yet to come to the session that goes on: all it has is in a checkpoint."""
        return self._resuming and not self._between

    def begins(self, steps: int) -> None:
        """A session is about to begin, after `steps` steps."""
        self._complete, self._failure = None, ""
        if len(self._before) == self._session.role.session:
            self._before.append(steps)
        self._resuming = False

    def ended(self, total: int | None, settled: int) -> None:
        """A session of `total` steps has ended, when `settled` were taken or given up."""
        self._complete = total if total == settled else None

    def progress(self, between: bool) -> dict[str, Any]:
        """Where the loop is, for a checkpoint."""
        steps, sessions = self._session.role.center.steps, self._session.role.session
        ends = [*self._before, steps][1 : sessions + between]
        complete = {} if self._complete is None or not between else {"complete": self._complete}
        return {"ends": ends, "before": ends[-1] if ends else 0, "between": between, "states": self._when, **complete}

    def save(self, directory: Path, between: bool) -> None:
        """Write a checkpoint, `between` two sessions or not; collective."""
        comm = self._session.comm
        if self._checkpoints is not None:
            self._checkpoints.finish()
        steps = int(allgather(comm, str(self._session.role.center.steps))[0])
        facts = partial(self._facts, between)
        OwnCheckpoints(directory, self._session, self._layout, facts, self._say, self._when).save(steps)
        wait_until(comm.Ibarrier().Test)
        self._saved_at = steps
        self._checkpoints = None if self._kept is None else self._set_up(self._kept)

    def _set_up(self, kept: Kept) -> OwnCheckpoints:
        facts = partial(self._facts, False)
        return OwnCheckpoints(kept.directory, self._session, self._layout, facts, self._say, self._when, kept.every)

    def fails(self, error: RuntimeError) -> None:
        """The session fails: `error` is raised at its end, after a checkpoint; now, where none is kept."""
        if self._kept is None or self._session.rule.allreduce:
            raise error
        self._failure = self._failure or str(error)

    def end_if_asked(self) -> None:
        """Raise Interrupted on all ranks, after a checkpoint, if any was asked to stop; RuntimeError if it failed."""
        if self._signals is None or self._kept is None:
            return
        why = json.dumps([self._failure, self._signals.received or ""])
        failures, received = zip(*map(json.loads, allgather(self._session.comm, why)))
        if any(failures) or any(received):
            self.save(self._kept.directory, between=False)
            raise RuntimeError(max(failures)) if any(failures) else Interrupted(abort=False)

    @contextmanager
    def signals_installed(self) -> Iterator[None]:
        """While in it, on the main thread: signals ask for an end; USR1 and USR2 also behind it, of the next one."""
        signals = self._signals if threading.current_thread() is threading.main_thread() else None
        if signals is None:
            yield
            return
        signals.install()
        try:
            yield
        except Interrupted:
            signals.remove()
            raise
        finally:
            signals.rest()

    def stepped(self) -> None:
        """A worker of this rank has taken a step."""
        if self._checkpoints is not None:
            self._checkpoints.stepped()

    def committed(self, c: Array) -> None:
        """A commit was applied, and the center is now `c` (n,)."""
        if self._checkpoints is not None:
            self._checkpoints.committed(c)

    def waiting(self) -> None:
        """Go on with what is under way."""
        if self._checkpoints is not None:
            self._checkpoints.waiting()

    def new_center(self) -> None:
        """Another rank serves: this rank may have another part in a checkpoint."""
        if self._kept is not None:
            self._checkpoints = self._set_up(self._kept)

    def finish(self) -> None:
        """For good: write what was done since the last checkpoint."""
        session = self._session
        if self._kept is not None and session.role.session and not session.members.lost and not self._resuming:
            steps = int(allgather(session.comm, str(session.role.center.steps))[0])
            if steps != self._saved_at:
                self.save(self._kept.directory, between=True)
        if self._checkpoints is not None:
            self._checkpoints.finish()
        if self._signals is not None and threading.current_thread() is threading.main_thread():
            self._signals.remove()
