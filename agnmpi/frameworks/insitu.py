"""In situ: a solver trains a surrogate of itself while it runs, in its own loop, and never waits for the training.

Every rank of the solver trains on what it computes; rank 0 holds the center beside. All of it happens inside the calls
below, a small share of the time: none of them waits for another rank but `Run(…)` and `close`, which are collective,
and `done`, which waits for ranks that are more than 0.1 s, or a time step, behind.
"""

import time
import warnings
from collections.abc import Callable, Generator, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array
from ..arrays.kernels import set_threads
from ..cluster.placement import check_world, fault_tolerant, place, require_equal_model
from ..core.backoff import wait_until
from ..core.drive import Unblocking
from ..core.optimizers import Optimizer
from ..core.params import Layout
from ..recovery.files import save
from ..training.abort import AbortOnException
from ..training.user_code import pack_gradients
from ..transport.agreement import allgather, raise_on_all, require_equal
from ..transport.p2p import CENTER
from ..version import __version__
from .budget import OFTEN, Budget, Question
from .insitu_center import Members, Place, Resting, parts
from .insitu_model import Surrogate as Surrogate
from .insitu_model import checked
from .samples import Receiver, Reservoir, Samples, Sender

_SAID_AFTER = 30.0  # seconds


class Status(NamedTuple):
    """What a rank knows of a run.

    Args:
        steps: taken by this rank.
        all_steps: taken by all ranks and committed, as of the last pull.
        clock: of the center at the last pull: commits applied.
        samples: put on this rank, or sent to it.
        loss: of this rank's last step, NaN before.
        used: the fraction of the time that was spent in the calls of the run.
        dropped: of the samples that this rank feeds, those that no rank that trains took in time.
    """

    steps: int
    all_steps: int
    clock: int
    samples: int
    loss: float
    used: float
    dropped: int = 0


class Run:
    """Train a surrogate inside a solver; on every rank of `comm`, collective.

        c ← c + (r/n)(x − o)·n·p·(s + 1)/n     (AGN at outer rate r; p: a rank's share of all samples, s: staleness)

    Args:
        surrogate: a `Surrogate`, or FILE.py:NAME of a class or function that makes one.
        comm: any communicator of the solver; it is duplicated.
        period: λ, a rank's steps between its exchanges, and more while one is under way; default 10.
        center: who holds the center. "solver" (default): rank 0, inside its own calls, beside its share of the work;
            "thread": a thread of rank 0, where MPI has MPI_THREAD_MULTIPLE; "rank": rank 0 of `comm` does nothing else;
            "none": nobody serves, each rank adds to it by MPI's one-sided calls.
        optimizer: of each rank; default adam(0.001).
        batch: samples of a step; default 64.
        capacity: samples in each rank's reservoir; default 10,000.
        steps: over all ranks, after which `done` is true; default: no end.
        outer_rate: r, the displacement of the center in a round of n commits; default 1.
        reads: whether this rank reads alone: it takes the center by `pull`, and neither trains nor is part of the
            solver.
        feeds: whether this rank computes, and does not train: what it puts is sent to the ranks that train. It may also
            read.
        solver: the ranks of `comm` that this rank calls `done` together with; default: all that train, or all that
            feed. Where several simulations feed one network, each gives its own.
        seed: of the initial parameters, the reservoirs and the batches; default 0.
        options: keyword arguments for the class or function that `surrogate` names.

    Raises:
        TypeError: for what is no communicator, surrogate or optimizer.
        ValueError: for other invalid arguments, or where ranks differ; on all ranks.

    >>> class Line:
    ...     def init(self, rng):
    ...         return {"w": np.zeros(1)}
    ...     def gradient(self, params, x, y):
    ...         error = x * params["w"] - y
    ...         return (error**2).mean() / 2, {"w": (error * x).mean(keepdims=True)}
    ...     def predict(self, params, x):
    ...         return x * params["w"]
    >>> from agnmpi import sgd
    >>> run, rng = Run(Line(), MPI.COMM_SELF, optimizer=sgd(0.5), steps=200), np.random.default_rng(0)
    >>> while not run.done:
    ...     x = rng.normal(size=100)  # a time step of the solver
    ...     run.put(x, 3 * x)
    ...     taken = run.learn(budget=0.5)
    >>> run.close()
    >>> run.predict(np.ones(2)).round(6)
    array([3., 3.])
    """

    def __init__(
        self,
        surrogate: "str | Surrogate",
        comm: MPI.Intracomm,
        period: int = 10,
        center: Place = "solver",
        *,
        optimizer: Optimizer | None = None,
        batch: int = 64,
        capacity: int = 10_000,
        steps: int | None = None,
        outer_rate: float = 1.0,
        reads: bool = False,
        feeds: bool = False,
        solver: MPI.Intracomm | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_world(comm)
        self._comm, self._rank = comm.Dup(), comm.rank
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)  # of ours alone: an error is an exception, whatever the solver has
        try:
            rng = raise_on_all(self._comm, lambda: np.random.default_rng([seed, comm.rank]))
            self._reservoir = raise_on_all(self._comm, lambda: Reservoir(capacity, rng))
            self._surrogate, self._layout, x, weight, optimizer = raise_on_all(self._comm, lambda: checked(
                surrogate, self._comm, period, center, optimizer, batch, steps, outer_rate, seed, options or {}
            ))  # fmt: skip
            facts = {"period": period, "center": center, "optimizer": optimizer.numbers, "steps": steps}
            does = "feeds" if feeds else "reads" if reads else "trains"
            members = _agreed(self._comm, self._layout, facts | {"outer_rate": outer_rate, "seed": seed}, does, center)
        except ValueError:  # on all ranks
            self._comm.Free()
            raise
        self.is_center = center == "rank" and comm.rank == CENTER
        self._solver = _solver(self._comm, "serves" if self.is_center else does, solver)
        self._batch, self.closed = batch, False  # closed: `close` has come to its end
        set_threads(place(self._comm, comm.rank in members.train).threads)
        self._hook = AbortOnException(self._comm)
        found = parts(self._comm, members, x, weight, optimizer, period, center, steps, self._reservoir)
        self._served, self._end, self._training, self._reader = found
        self._samples, self._sender, self._receiver = _samples(self._comm, members, self._reservoir, seed)
        self._views, self._g, self._taken, self._loss = self._layout.views(x), np.empty_like(x), 0, nan
        self._done, self._stop, self._has_put = False, False, False
        self._seen, self._looked = 1, 0.0  # pulls; time of the last look at messages
        # Every rank has the center before any goes on; the barrier is for rank 0, which serves until then.
        self._wait(self._has_begun)
        self._wait(self._comm.Ibarrier().Test)
        self._budget, self._question = Budget(), Question(self._solver)

    # --- in the solver's loop ---

    def put(self, x: Samples, y: Samples) -> None:
        """Offer samples x (m, …), y (m, …) of this rank: those that its reservoir keeps are copied. Never waits.

        On a rank that feeds they are copied and sent to a rank that trains, or dropped and counted while messages
        enough are under way.
        """
        with self._budget:
            if self._sender is not None and not self.closed:
                self._sender.put(x, y)
            else:
                self._trainer("put")
                self._reservoir.put(x, y)
                self._has_put = True

    def learn(self, budget: float = 0.02, most: int | None = None) -> int:
        """Train for at most a share `budget` of the time since the last call; returns the number of steps taken.

        The share is saved up, and spent in turns: calls whose number is a multiple of a power of two, so that the ranks
        of a solver train at the same time, and do not wait for each other twice. Two turns are as far apart as a step
        needs, or at most a second; a turn without time for a step takes none, and what it leaves is kept for one step.
        Exchanges are paid from it, too, on rank 0 also those of the others, but from half of it at most. Never waits:
        before there are samples for a batch, or where an exchange takes longer than the steps that this rank holds, it
        may take no step.

        Args:
            budget: at least 0; default 0.02; from 1 on each call is a turn, and time no limit, only `most` and the
                samples.
            most: steps; default: as many as fit.
        """
        if not (budget >= 0 and isfinite(budget)):
            raise ValueError(f"rank {self._rank}: the budget is a share of the time, at least 0, not {budget!r}")
        training, taken = self._trainer("learn"), 0
        if not self._budget.grant(budget):
            if time.perf_counter() - self._looked > OFTEN:
                with self._budget:
                    self._poll()
            return 0
        with self._budget:
            self._poll()
            while taken != most and self._budget.allows_step() and self._is_due(training):
                with self._budget.step():
                    self._step(training)
                taken += 1
                self._poll()
        self._budget.end_turn()
        return taken

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or any rank has called `stop`: the same on all ranks of the solver.

        Read it once in each time step, on every rank of the solver. The answer is up to 0.2 s old, or two time steps,
        if these are longer: a sum over the ranks that was under way meanwhile, and is looked at each 0.1 s. On ranks
        that only read, or feed: whether nobody trains any more. On ranks that train on what others feed alone, also
        whether these have all called `close`.

        Here a rank that holds steps, and has taken none for 2 s, gives them to the others: nothing was put on it, or
        `learn` is not called there, or has no budget. It is given others once it can take one. Where no rank takes
        steps, nobody is done.
        """
        if self._reader is not None and (self._sender is None or self.closed):
            return self._reader.done or self.closed
        if not self._done:
            if self._question.is_due:
                with self._budget:
                    self._ask()
            self._question.read += 1
        return self._done

    def _ask(self) -> None:
        """Take the answers to the last question, and ask the next; all ranks of the solver in the same time step."""
        self._poll()
        question, goes_on = self._question, self._goes_on()
        if question.request is not None:
            test = question.request.Test
            self._wait(test, "`done`: every rank of the solver must read it once in each time step")
            unfinished, stopped, self._budget.agreed = question.answers()
            self._done = not unfinished or bool(stopped)
        if not self._done:
            question.ask(goes_on, self._stop, self._budget.wanted)

    def pull(self) -> bool:
        """On a rank that reads or feeds: ask for the newest center; whether one has come since the last call.

        Never waits.
        """
        if self._reader is None:
            raise RuntimeError(f"rank {self._rank} does not read: it pulls when it has trained")
        with self._budget:
            self._reader.poll()
            seen, self._seen = self._seen, self._reader.pulls
            self._reader.pull()
        return self._seen > seen

    def stop(self) -> None:
        """Let `done` become true on all ranks of the solver."""
        self._stop = True

    def predict(self, x: Samples) -> Samples:
        """Predict y (m, …) from x (m, …) with the center as this rank has it. Never waits."""
        return self._surrogate.predict(self._layout.views(self._center()), x)

    @property
    def params(self) -> dict[str, Array]:
        """A copy of the center as this rank has it, by name; after `close` the final one, on every rank."""
        return self._layout.views(self._center().copy())

    @property
    def status(self) -> Status:
        """What this rank knows of the run."""
        if self._served is not None and self._training is None:
            center = self._served.center
            return Status(0, center.steps, center.clock, 0, nan, 1.0)
        reply = (self._reader or self._worker).last_reply
        known = (reply.steps, reply.clock) if reply else (0, 0)
        samples, dropped = self._reservoir.seen, 0
        if self._sender is not None:
            samples, dropped = self._sender.offered, self._sender.dropped
        return Status(self._taken, *known, samples, self._loss, self._budget.used, dropped)

    # --- the center, and the end ---

    def serve(self, every: float = 1.0) -> Generator[Status, None, None]:
        """On rank 0 with center="rank": serve until all others have called `close`; yields each `every` seconds."""
        if not self.is_center or self._served is None:
            raise RuntimeError(f'rank {self._rank} has nothing to serve: only rank 0, with center="rank"')
        end, at = self._served.end, 0.0

        def interrupted() -> bool:
            return not end.live or time.monotonic() >= at

        while end.live:
            at = time.monotonic() + every
            self._wait(interrupted)
            yield self.status

    def save(self, path: "str | Path") -> None:
        """Write the center as this rank has it to a safetensors file."""
        facts = {"agnmpi": __version__, "clock": str(self.status.clock)}
        try:
            save(Path(path), self._layout.views(self._center()), facts)
        except OSError as error:  # names a temporary file, or none
            raise OSError(error.errno, error.strerror, str(path)) from None

    def close(self, save: "str | Path | None" = None) -> None:
        """Commit what is done, wait for all ranks, and take the final center; collective.

        Args:
            save: rank 0 writes the final center there, as safetensors.
        """
        if self.closed:
            return
        if self._training is not None:
            self._worker.leaves = True
            self._training.leave()
        if self._sender is not None:
            self._sender.end()
        self._wait(self._has_left)
        if self._served is not None:
            self._served.join()
        if save is not None and self._rank == CENTER:
            self.save(save)
        self.closed = True
        self._hook.remove()
        if self._served is not None and self._served.end.lost:
            return  # with dead ranks MPI's collectives would not return
        if self._end is not None:
            self._end.close()
        if self._samples is not None and not fault_tolerant():
            self._samples.Free()
        if not self.is_center and not fault_tolerant():
            require_equal(self._solver, {"the number of times that `done` was read": str(self._question.read)})
            if self._question.request is not None:
                wait_until(self._question.request.Test)
            self._solver.Free()
            self._comm.Free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error the other ranks do not call the collective close
            self.close()

    # --- how ---

    def _trainer(self, what: str) -> Unblocking:
        if self.closed:
            raise RuntimeError(f"rank {self._rank}: {what} after close")
        if self._training is None:
            does, calls = ("reads or feeds", "pull") if self._reader else ("is the center", "serve")
            raise RuntimeError(f"rank {self._rank} {does}, and does not train: call {calls}, or close")
        return self._training

    def _is_due(self, training: Unblocking) -> bool:
        """Whether to take a step now; else, where one could be taken, work was asked for."""
        self._worker.ready = self._reservoir.seen >= self._batch
        due = training.is_due()
        self._worker.ready = False
        return due

    def _step(self, training: Unblocking) -> None:
        training.worker.samples = self._reservoir.seen
        returned = self._surrogate.gradient(self._views, *self._reservoir.batch(self._batch))
        self._loss = pack_gradients(returned, self._layout, self._surrogate.gradient, self._g)
        training.step(self._g, self._loss)
        self._taken += 1

    def _center(self) -> Array:
        if self._served is not None and self._training is None:
            return self._served.end.c
        return (self._reader or self._worker).o

    @property
    def _worker(self) -> Resting:
        assert self._training is not None
        assert isinstance(self._training.worker, Resting)
        return self._training.worker

    def _poll(self) -> None:
        """Serve what has arrived, at a rank that serves; take and send samples, where ranks feed."""
        self._looked = time.perf_counter()
        if self._served is not None:
            self._served.poll()
        if self._receiver is not None:
            self._receiver.poll()
        if self._sender is not None:
            self._sender.poll()

    def _goes_on(self) -> bool:
        """Whether there is something to train, as far as this rank knows."""
        if self._reader is not None:
            self._reader.poll()
            self._reader.look()
            return not self._reader.done
        training = self._trainer("done")
        self._worker.look()
        training.is_due()
        no_more_comes = self._receiver is not None and self._receiver.ended and not self._has_put
        return not (training.finished or no_more_comes)

    def _has_begun(self) -> bool:
        """Whether this rank has the center; it may have no work, if the others hold it all."""
        if self._reader is not None:
            return self._reader.poll()
        return self._training is None or self._training.is_due() or self._training.worker.pulls > 0

    def _has_left(self) -> bool:
        if self._training is not None:
            self._training.is_due()
        if self._reader is not None:
            self._reader.leave()
        own = all(each.left for each in (self._training, self._reader) if each is not None)
        own &= self._sender is None or not self._sender.poll()
        own &= self._receiver is None or self._receiver.ended
        return own and (self._served is None or not self._served.end.live)

    def _wait(self, test: Callable[[], bool], what: str = "") -> None:
        """Wait until `test()`, and serve meanwhile; `what`: to be said of a long wait."""
        begin, said = time.monotonic(), not what

        def polled() -> bool:
            nonlocal said
            self._poll()
            if not said and time.monotonic() - begin > _SAID_AFTER:
                said = True
                text = f"rank {self._rank} has waited for {_SAID_AFTER:.0f} s in {what}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
            return test()

        served = self._served
        if served is None:
            wait_until(polled)
            return
        served.patient = False
        wait_until(polled, lambda: served.end.progress)
        served.patient = True


def _agreed(comm: MPI.Intracomm, layout: Layout, facts: Mapping[str, object], does: str, center: Place) -> Members:
    """Who takes part; raises ValueError, on all ranks, where they differ in what they train, or none does."""
    require_equal_model(comm, layout, {name: str(value) for name, value in facts.items()})
    who = allgather(comm, does)
    return raise_on_all(comm, lambda: Members.of(who, center))


def _solver(comm: MPI.Intracomm, does: str, given: MPI.Intracomm | None) -> MPI.Intracomm:
    """The ranks that `done` is asked with: those that do the same, or a solver's own where it computes; collective."""
    same = comm.Split(("serves", "trains", "reads", "feeds").index(does), comm.rank)
    if given is not None and does in ("trains", "feeds"):
        same.Free()
        same = given.Dup()
    assert isinstance(same, MPI.Intracomm)
    return same


def _samples(
    comm: MPI.Intracomm, members: Members, reservoir: Reservoir, seed: int
) -> tuple[MPI.Intracomm | None, Sender | None, Receiver | None]:
    """Where ranks feed: the communicator of samples, and what sends or receives them here; collective."""
    if not members.feed:
        return None, None, None
    own = comm.Dup()
    own.Set_errhandler(MPI.ERRORS_RETURN)
    if comm.rank in members.feed:
        return own, Sender(own, members.train, np.random.default_rng([seed, comm.rank])), None
    return own, None, Receiver(own, members.feed, reservoir) if comm.rank in members.train else None
