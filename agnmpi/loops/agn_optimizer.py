"""AGNOptimizer: for programs with their own training loop."""

import atexit
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any, TypeAlias

from mpi4py import MPI

from ..arrays.backend import Array, bring, namespace
from ..cluster.machine import limit_blas
from ..cluster.placement import check_world, require_equal_model
from ..cluster.probe import choose_wire
from ..cluster.setup import Setup, check_setup
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..training.abort import AbortOnException, forked
from ..training.evaluations import Point
from ..transport.agreement import ConfigError, raise_on_all
from ..transport.registry import Transport
from .arguments import Arguments
from .gradients import Gradients, by_name, fill, value_and_gradients
from .hook import Hook
from .loop import Loop
from .monitoring import LoopMonitor, Monitoring
from .own_arrays import OwnArrays, one_vector
from .terms import Asked, Caller, Kept, Status
from .warner import advise, warn_of_threads

Loss: TypeAlias = Callable[[Mapping[str, Array]], tuple[float, Gradients]]
Event: TypeAlias = Callable[["AGNOptimizer"], object]


class AGNOptimizer:
    """Train the parameters of your own loop with Accumulated Gradient Normalization over `comm`.

    Each worker: λ local steps, then a ← (x − o)/λ, center c ← c + a, x ← c. The same script runs on every rank: on
    rank 0 the loop `for step in opt.steps(n)` serves and yields nothing.

    Args:
        optimizer: from `agnmpi.sgd`, `adam`, …, or None if you update the parameters yourself and call `step()`.
        params: arrays by name (or a sequence, or one array), copied; with `optimizer=None` your own arrays, which are
            updated at each exchange, and may be of several dtypes, also float16.
        comm: any communicator; it is duplicated. Its rank 0 holds the center.
        communication_period: λ, local steps between exchanges; default 10.
        use_locking: TensorFlow's option; False, with transport "rma", is transport "accumulate": commits are summed
            directly into the center, element by element. Default True.
        name: of this optimizer, in messages.
        rule: another rule of exchange than AGN, or one that weighs commits, such as
            `rules.weighted(rules.agn(), rules.outer_rate(1.0))`.
        variant: of AGN: "displacement" (default), or "gradient" as TensorFlow did.
        center_optimizer: steps the center, with −delta as gradient; None (default) adds. `optimistic(1.0, span=n)`,
            with a period of 1 or 2 and outer_rate 1, undoes most of what lateness costs.
        transport: made by `agnmpi.transports`, such as `transports.p2p(message_buffers=8)`, or its name; "auto"
            (default) depends on the rule.
        overlap: compute while an exchange is under way; default False.
        wait: False: as overlap, but where an exchange takes longer than λ steps the worker takes more of them before
            the next, up to 7 λ; steps count as they are, AGN divides by their number. Default True: exactly λ.
        dylu: λ is that of the fastest worker, the others' are proportional to their speeds; default False.
        buffers: names of those `params` that no gradient moves, but you: running means, as of batch normalization. The
            center takes their convex mean, c_b ← c_b + (b − c_b)/n; a pull brings them back. Default: none.
        outer_rate: r, how many mean displacements a round of n commits moves the center: commits of AGN, DOWNPOUR and
            DynSGD count rλ/n. None (default): as they are, which is n/λ with AGN.
        copy: False: `params` are one vector, or lie in one, one after the other (`buffers` last), the flat one.
            Default True.
        on_commit: called with this optimizer when the parameters are about to be read: fill `flat` where yours are
            elsewhere.
        on_pull: called with this optimizer when the parameters have become a center that was pulled.
        on_refused: called, after that, where this worker's last commit was refused (NaN, infinity): if you keep moments
            of your own, set them to 0.
        checkpoint: directory for checkpoints, written every `checkpoint_every` seconds (default 300), at `close`, and
            when a signal (USR1, USR2, TERM, INT) comes in a loop, which then raises `Interrupted` on all ranks.
            None (default): none, and signals are yours.
        checkpoint_workers: which checkpoints hold, beside the center, what each worker has alone, such as moments:
            "all"; "end", those at the end and after a signal; "none"; "auto" (default): "all" up to 256 MB of all
            workers together, else "end".
        resume: "auto": from the newest checkpoint in `checkpoint`, if there is one; else a directory that has one.
        state, load_state: arrays of yours on this rank, such as moments, that checkpoints hold; called with them.
        monitor: `agnmpi.Monitoring(…)`, or its directory alone: what `agnmpi train` shows and writes, of your loop.
        tensors: what lies in a vector of yours, by name, in order, in any words, such as shapes: a checkpoint of a run
            where that was otherwise is refused. Default: the parameters' shapes alone.

    Raises:
        TypeError: for what is not an array or optimizer.
        ValueError: for invalid shapes, names or numbers, or where ranks differ.
        RuntimeError: for use after the end.

    Source: Hermans, Spanakis, Moeckel, ACML 2017, arXiv:1710.02368; vocabulary of TensorFlow 1.14's
    `tf.contrib.opt.AGNOptimizer`.

    >>> import numpy as np
    >>> from agnmpi import AGNOptimizer, sgd
    >>> opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(2)}, MPI.COMM_SELF, communication_period=4, transport="local")
    >>> for step in opt.steps(8):
    ...     loss = opt.minimize(lambda p: (float(p["w"].sum()), {"w": -np.ones(2)}))
    >>> opt.center["w"]
    array([0.2, 0.2])
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        params: Any,
        comm: MPI.Intracomm,
        communication_period: int = 10,
        use_locking: bool = True,
        name: str = "AGNOptimizer",
        *,
        rule: Rule | None = None,
        variant: str = "displacement",
        center_optimizer: Optimizer | None = None,
        transport: str | Transport = "auto",
        overlap: bool = False,
        wait: bool = True,
        dylu: bool = False,
        buffers: Collection[str] = (),
        outer_rate: float | None = None,
        copy: bool = True,
        on_commit: "Event | None" = None,
        on_pull: "Event | None" = None,
        on_refused: "Event | None" = None,
        checkpoint: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: float = 300.0,
        checkpoint_workers: str = "auto",
        state: Callable[[], Mapping[str, Array]] = dict,
        load_state: Callable[[Mapping[str, Array]], object] = bool,
        monitor: Monitoring | str | Path | None = None,
        tensors: Mapping[str, str] | None = None,
    ) -> None:
        check_world(comm)
        warn_of_threads(name)
        self._kept, self._caller_state = Kept.of(checkpoint, checkpoint_every, checkpoint_workers), (state, load_state)
        self._comm, self._name, self._optimizer, self.loss = comm.Dup(), name, optimizer, nan
        self._hook = AbortOnException(self._comm)
        self._on_commit, self._on_pull, self._on_refused, self._tensors = on_commit, on_pull, on_refused, tensors
        try:
            raise_on_all(self._comm, lambda: self._kept and self._comm.rank == 0 and self._kept.make())
            arguments = Arguments(
                optimizer, center_optimizer, params, communication_period, rule, variant, transport, buffers,
                outer_rate, copy,
            )  # fmt: skip
            self._loop = self._set_up(arguments, use_locking, overlap, wait, dylu, monitor, resume is not None)
            self._resume(resume)
        except ValueError:  # a ConfigError among them: on all ranks
            self._hook.remove()
            self._comm.Free()
            raise
        atexit.register(self._at_exit)  # before mpi4py finalizes MPI

    def _resume(self, resume: str | Path | None) -> None:
        if resume is None:
            return
        if resume != "auto":
            self._loop.restore(Path(resume), required=True)
        elif self._kept is not None:
            self._loop.restore(self._kept.directory, required=False)
        else:
            raise ConfigError('resume="auto" needs checkpoint, the directory')

    def _set_up(
        self,
        arguments: Arguments,
        use_locking: bool,
        overlap: bool,
        wait: bool,
        dylu: bool,
        monitor: Monitoring | str | Path | None,
        resumes: bool,
    ) -> Loop:
        """Compare with the other ranks, create the flat vector, and connect; errors are raised on all ranks."""
        comm, optimizer = self._comm, arguments.optimizer
        rule, layout, period, transport = raise_on_all(comm, lambda: arguments.checked(use_locking))
        facts = arguments.facts(rule, period, transport) | {
            "overlap": str(overlap),
            "wait": str(wait),
            "dylu": str(dylu),
            "checkpoint": "none" if self._kept is None else "every {1:g} s, workers {2}".format(*self._kept),
        }
        require_equal_model(comm, layout, facts)
        setup = Setup(transport, overlap or not wait, dylu, wait=wait).on_hosts(comm)
        check_setup(rule, setup, comm.size, optimizer, arguments.center_optimizer)
        # Of variant "gradient": of the same kind, with its own slots.
        center_optimizer = arguments.center_optimizer or (optimizer if rule.accumulates else None)
        self._layout = layout
        self._x = layout.pack(arguments.params) if arguments.copy else one_vector(arguments.params, layout)
        self._views = layout.views(self._x)
        self._own = OwnArrays(arguments.params, layout, self._x) if optimizer is None else None
        self._g = namespace(self._x).empty_like(self._x) if optimizer else self._x[:0]
        wire = choose_wire(comm, self._x, setup.transport)
        setup = setup._replace(transport=replace(setup.transport, wire=wire))
        self._sharded = len(setup.center_ranks) > 1
        caller = Caller(self._pack, self._pulled, self._refused, *self._caller_state, self._tensors or {})
        options = facts | {"rule": rule.name, "transport": transport.name, "period": period}
        del options["communication_period"]  # the command line's name of it is period
        where = self._kept and self._kept.directory
        given = Monitoring.of(monitor)
        self._monitor = LoopMonitor(given, comm, where, resumes, options, layout, self._x) if given else None
        loop = Loop(
            comm, rule, self._x, optimizer, center_optimizer, setup, period, self._name, caller, layout, self._kept,
            self._monitor,
        )  # fmt: skip
        self._restore_blas = limit_blas(loop.session.threads)
        if comm.rank == 0 and not (arguments.rule and arguments.rule.weighs):  # a weight of the caller's is not called
            advise(self._name, rule, loop.session.role.count, period, center_optimizer is None)
        for text in (setup.unthreaded, loop.session.role.caveat):
            if text and comm.rank == 0:
                warnings.warn(f"{self._name}: {text}", RuntimeWarning, stacklevel=4)
        return loop

    @property
    def params(self) -> dict[str, Array]:
        """The parameters by name: views of the flat vector, or with `optimizer=None` your own arrays. Never blocks."""
        return dict(self._own.arrays if self._own else self._views)

    @property
    def flat(self) -> Array:
        """(n,) the parameters as one vector; where your own arrays are copied, it is filled at exchanges alone."""
        return self._x

    @property
    def center(self) -> dict[str, Array]:
        """A copy of the center variable, by name, as last pulled; after the loop the final one, on every rank.

        It is on the device of this rank's parameters. Never blocks: after a `break`, call `finish` first.
        """
        return self._layout.views(bring(self._loop.session.role.c.copy(), self._x))

    @property
    def clock(self) -> int:
        """The center's clock, as this rank knows it: number of commits applied."""
        return self._loop.worker.clock if self._loop.worker else self._loop.session.role.center.clock

    @property
    def global_step(self) -> int:
        """TensorFlow's name for `clock`."""
        return self.clock

    @property
    def taken(self) -> int:
        """Steps in all commits so far, of all workers and loops, as this rank knows it."""
        return self._loop.taken

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator in use: a duplicate of yours, without lost ranks (ULFM)."""
        return self._loop.session.comm

    @property
    def num_workers(self) -> int:
        """Number of workers n."""
        return self._loop.session.role.count

    @property
    def worker(self) -> int:
        """The number of this worker, from 0; spares have those from n on. −1 on a rank that serves."""
        return self._loop.worker.index if self._loop.worker else -1

    @property
    def num_worker(self) -> int:
        """TensorFlow's name for `num_workers`."""
        return self.num_workers

    @property
    def is_center(self) -> bool:
        """Whether this rank serves the center and does not train."""
        return self._loop.session.role.serves

    def steps(
        self,
        total: int | None = None,
        at_center: Callable[[Status], object] | None = None,
        every: int = 1000,
        ahead: int = 0,
    ) -> Generator[int, None, None]:
        """Yield the number of each step granted to this worker; each of 0 … total−1 is granted to one worker.

        On a center rank it serves until all workers are done, and yields nothing. May be called again: parameters,
        slots, clock and schedules continue. Every rank starts from rank 0's parameters as they are then. At the end
        `params` and `center` are the final center on every rank; after a `break` they are once `finish` has been
        called. The body calls `minimize`, `apply_gradients` or `step` once, or `skip`.

        Args:
            total: steps over all workers; None (default) until the workers `break`, or one calls `stop`.
            at_center: called with a `Status` at rank 0 while that serves, in a thread; where all ranks train, between
                two steps. It must not call MPI. Its errors are reported, and training goes on.
            every: steps between two calls of it; default 1000.
            ahead: how many times λ steps a worker is granted beyond those that it takes (see `granted`); default 0.
        """
        if every <= 0:
            raise ValueError(f"every must be a positive number of steps, not {every}")

        def call(point: Point, c: Array) -> None:
            assert at_center is not None
            at_center(self._status(point, bring(c, self._x)))

        return self._loop.steps(Asked(total, call if at_center else None, every, ahead))

    def stop(self) -> None:
        """End the loop for all, from any rank, or from `at_center`: each worker stops after its period.

        With an allreduce rule only loops over `steps()` without a number: there others cannot tell it from a failure.
        Raises RuntimeError for one with a number.
        """
        self._loop.stop()

    @property
    def stopped(self) -> str:
        """Why `monitor` has ended this loop, and those to come; "" if it has not."""
        return self._monitor.stopped if self._monitor is not None else ""

    @property
    def granted(self) -> list[int]:
        """The numbers of the steps that this worker is to take, the next first; their samples may be loaded already."""
        worker = self._loop.worker
        return [] if worker is None else worker.held.numbers

    @property
    def status(self) -> Status:
        """How far the run is, as this rank knows it, with a copy of the center. Never blocks."""
        return self._status(self._loop.point, bring(self._loop.session.role.c.copy(), self._x))

    def _status(self, point: Point, c: Array) -> Status:
        center = self._loop.session.role.center
        rate = self._loop.steps_per_second
        return Status(*point, center.staleness_mean, rate, self._layout.views(c))

    def finish(self) -> None:
        """After a `break`: wait until all workers have left, and take the final center.

        With `checkpoint` or `monitor` the others' loops end only then: call it before a collective of your own.

        The next `steps`, and `close`, do this automatically. A generator that you still reference must be closed first.
        """
        self._loop.finish()

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint of everything, between two loops; collective. It lies in `directory`/checkpoints."""
        self._loop.save(Path(directory))

    def restore(self, directory: str | Path) -> None:
        """Continue from the newest checkpoint in `directory`; collective, before the first loop.

        The loops that were complete then yield nothing, and the one that was not goes on where it was: a script is
        started again as it is. Where it asks for more steps now, the last of the complete ones goes on, too. Raises
        ValueError if there is no checkpoint, or one of another model.
        """
        self._loop.restore(Path(directory), required=True)

    def initialize(self) -> None:
        """Start every worker from the center: rank 0's values, whatever its own were. Collective."""
        for _ in self.steps(0):
            raise AssertionError("no step was granted")

    def compute_gradients(self, loss: Loss, var_list: Iterable[Any] | None = None) -> list[tuple[Array | None, Array]]:
        """Return (gradient, variable) pairs of `loss`.

        `loss(params) -> (value, gradients)`: gradients by name, or in the order of the parameters; None for
        a variable without one. `var_list`: names or variables to return, all if None. The value is in `self.loss`.
        """
        self._loop.check()
        value, gradients = value_and_gradients(loss(self.params), self._comm.rank)
        named = by_name(gradients, self._layout)
        self.loss = float(value)
        selected = self._layout.names if var_list is None else [self._name_of(v) for v in var_list]
        return [(named[name], self._views[name]) for name in selected]

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> None:
        """Take a local step with (gradient, variable) pairs, and exchange when λ steps are done.

        A gradient may be None: its variable and the slots of it do not change, nor do variables that are not
        listed. (With variant "gradient" its mean gradient is zero at the center, as in TensorFlow: there momentum
        and weight decay may still change it.) Raises ValueError if none has a gradient, or for a wrong shape; TypeError
        for what is not a variable.
        """
        self._loop.check()
        if self._optimizer is None:
            raise RuntimeError(f"{self._name} has no optimizer: move the parameters and call step()")
        given = ((self._name_of(variable), gradient) for gradient, variable in grads_and_vars)
        self._loop.step(self._g, self.loss, fill(self._g, given, self._layout, self._comm.rank))

    def minimize(self, loss: Loss, var_list: Iterable[Any] | None = None) -> float:
        """Compute the gradients, apply them, and return the value of the loss before the step."""
        self.apply_gradients(self.compute_gradients(loss, var_list))
        return self.loss

    def step(self, loss: float = nan) -> None:
        """With `optimizer=None`: count one step that you have taken, and exchange after λ."""
        self._loop.check()
        if self._optimizer is not None:
            raise RuntimeError(f"{self._name} has an optimizer: call minimize() or apply_gradients()")
        self._loop.step(None, loss)

    def skip(self) -> None:
        """Take no step in this turn: gradients accumulate, or a scaler has found infinity. The next has its number."""
        self._loop.skip()

    def make_session_run_hook(
        self, is_chief: bool | None = None, task_index: int | None = None, total: int | None = None
    ) -> Hook:
        """Return a hook for training loops that take callbacks; see Hook.

        `is_chief`, `task_index`: as in TensorFlow, worker 0 being the chief; known from `comm`, and only checked
        if given. `total`: as in `steps`.
        """
        index = self._loop.worker.index if self._loop.worker else None
        if index is not None and task_index is not None and task_index != index:
            raise ValueError(f"task_index {task_index}, but rank {self._comm.rank} is worker {index}")
        if index is not None and is_chief is not None and is_chief != (index == 0):
            raise ValueError(f"is_chief {is_chief}, but rank {self._comm.rank} is worker {index}")
        return Hook(self.steps(total))

    def get_name(self) -> str:
        """The name of this optimizer."""
        return self._name

    def get_slot_names(self) -> list[str]:
        """Names of the slots on this rank: the local optimizer's, on a center rank the center optimizer's.

        Empty at several centers, which hold a block of each.
        """
        return list(self._slots())

    def get_slot(self, var: Any, name: str) -> Array:
        """View of slot `name` of variable `var` (a name or a variable). Raises ValueError for an unknown slot."""
        slots = self._slots()
        if name not in slots:
            raise ValueError(f"no slot {name!r}; there are {list(slots)}")
        return self._layout.views(slots[name])[self._name_of(var)]

    def variables(self) -> list[Array]:
        """Views of all slots of all parameters on this rank."""
        return [view for slot in self._slots().values() for view in self._layout.views(slot).values()]

    def close(self) -> None:
        """Free communicator and windows; collective. Afterwards `center` can still be read."""
        if self._loop.closed:
            return
        self._loop.end()
        atexit.unregister(self._at_exit)
        self._hook.remove()
        self._restore_blas()
        session = self._loop.session
        session.close()
        if not session.members.lost:  # with dead ranks it would not return
            self._comm.Free()

    def _at_exit(self) -> None:
        """It was not closed, perhaps after a sys.exit on this rank alone: leave, so that the others can end, too."""
        if not MPI.Is_finalized() and not forked():
            self.close()

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error the other ranks do not call the collective close
            self.close()

    def _slots(self) -> dict[str, Array]:
        worker, center = self._loop.worker, self._loop.session.role.center
        if worker is None and self._sharded:  # blocks of slots: no views of whole variables
            return {}
        optimizer, state = (worker.optimizer, worker.state) if worker else (center.optimizer, center.state)
        return optimizer.slots(state) if optimizer else {}

    def _name_of(self, variable: Any) -> str:
        if isinstance(variable, str):
            if variable in self._views:
                return variable
            raise ValueError(f"no parameter {variable!r}; there are {list(self._views)}")
        for name, view in (self._views | (self._own.arrays if self._own else {})).items():
            if variable is view:
                return name
        raise TypeError(f"{type(variable).__name__} is no variable of {self._name}: give one of `params`, or its name")

    def _pack(self) -> None:
        if self._on_commit is not None:
            self._on_commit(self)
        if self._own is not None:
            self._own.pack()

    def _pulled(self) -> None:
        if self._own is not None:
            self._own.unpack()
        if self._on_pull is not None:
            self._on_pull(self)

    def _refused(self) -> None:
        if self._on_refused is not None:
            self._on_refused(self)
