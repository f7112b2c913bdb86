"""What a run is in every framework: batches on workers, service and evaluation at the center, the end."""

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import wraps
from math import nan
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from ..arrays.backend import Array
from ..core.batches import Plan
from ..loops.agn_optimizer import AGNOptimizer
from ..loops.monitoring import Monitoring
from ..loops.terms import Status
from ..recovery.files import load
from ..training.exits import Interrupted
from . import randomness
from .sampler import Dealt, Sampler, ahead

Batch = TypeVar("Batch")
_MANY_TURNS = 100  # without a step: gradients accumulate over fewer


class _Place(NamedTuple):
    """Where in its script a run is."""

    loops: int  # begun
    ended: int  # 0 within the last of them, 1 after it
    passes: int  # over loaders, begun
    batches: int  # taken of the last of them


class Run(ABC):
    """A run on one rank; the classes of the frameworks say what their `opt` moves.

    Args:
        opt: made with this run's `_state` and `_resumed_with` as its `state` and `load_state`.
        period: λ.
        checkpoint: its directory for checkpoints, if it has one.
    """

    _saved: Mapping[str, Array] | None = None  # of this worker, until the script is where that was saved
    _steps_by: str  # the call that is one

    def __init__(self, opt: AGNOptimizer, period: int, checkpoint: str | Path | None) -> None:
        self._opt, self._period, self._checkpoint = opt, period, checkpoint
        self._taken, self._loss, self._untaken = True, nan, 0  # the step of this turn, its loss, turns without one
        self._held = threading.RLock()  # by the one that lets what is trained hold another center
        self._place = _Place(0, 1, 0, 0)
        self._loader: Any = None  # of the last pass of this loop
        self._dealing: tuple[Sampler, int] | None = None  # in this loop, which began after so many steps
        self._pass_began: dict[str, Array] = {}  # the random generators at the beginning of that pass
        self._pass_resumed: Mapping[str, Array] | None = None  # the saved state, until its pass goes on
        self._evaluation: tuple[Callable[[Status], object] | None, int] = None, 1

    def evaluate(self, function: Callable[[Status], object], every: int) -> None:
        """Call `function(status)` at rank 0 while it serves, as often as every so many steps of all workers.

        What is trained holds the center meanwhile; `status` has its steps, clock, loss and speed. It runs in a thread
        (where all ranks train, between two steps) and must not call MPI. Its errors are reported, and training goes on.

        Args:
            function: the same on every rank, or on rank 0 alone; for the loops that begin from now on.
            every: at least 1.

        Raises:
            ValueError: for another `every`.
        """
        if every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, not {every}")

        def holding_the_center(status: Status) -> None:
            with self._holding_parts(status.center):
                function(status)

        self._evaluation = holding_the_center, every

    def batches(self, loader: Iterable[Batch], steps: int | None = None) -> Generator[Batch, None, None]:
        """Yield batches of `loader` to train on, one for each step granted to this worker; on a center rank none.

        A turn without a step (gradients accumulate, a GradScaler skips it) does not count. Afterwards every rank has
        the center. It may be called again, epoch by epoch, and left with `break`.

        Args:
            loader: gone through again and again; its sampler's `set_epoch` is called, if it has one.
            steps: over all workers. None (default): each worker goes through its own loader once, and leaves; through
                one with `sampler` all go together, until its epochs are dealt out.

        Raises:
            ValueError: for a loader without batches, where steps are to be taken.
        """
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, Sampler):
            yield from self._dealt(loader, sampler, steps)
            return
        source = self._batches_of(loader, endless=steps is not None)
        with closing(self.turns(steps)) as turns:
            for _ in turns:
                try:
                    batch = next(source)
                except StopIteration:  # one's own data end
                    break
                yield batch
            else:
                return
        self._finish()

    def sampler(self, dataset: Sized, batch: int, epochs: float, seed: int = 0) -> Sampler:
        """A `batch_sampler` for a DataLoader, which deals out each sample of an epoch once, over all workers.

        Fast workers get more. A batch belongs to one step: gradients do not accumulate over several.

        Args:
            dataset: of this length on every rank.
            batch: samples in a step.
            epochs: passes over the samples.
            seed: orders them.

        Raises:
            ValueError: for no samples, an empty batch, or no steps.
        """
        return Sampler(Plan(len(dataset), batch, epochs, seed=seed), lambda: self._opt.granted)

    def _dealt(self, loader: Any, sampler: Sampler, steps: int | None) -> Generator[Any, None, None]:
        """The batches of a loader with a `sampler`."""
        self._settle()  # after a break
        before, source = self._opt.taken, Dealt(loader, sampler, self._pass)
        total = sampler.plan.steps - sampler.start if steps is None else steps
        with closing(self._turns(total, ahead(loader, self._period), sampler)) as turns:
            for number in turns:
                yield source.batch(number - before)

    def turns(self, steps: int | None = None, ahead: int = 0) -> Generator[int, None, None]:
        """As `batches`, without a loader: yield the numbers of the steps, for a loop that fetches its own data.

        `ahead`: as of `AGNOptimizer.steps`.
        """
        return self._turns(steps, ahead)

    def _turns(self, steps: int | None, ahead: int, sampler: Sampler | None = None) -> Generator[int, None, None]:
        self._settle()
        before = self._opt.taken
        self._dealing = None if sampler is None else (sampler, before)
        self._place = self._place._replace(loops=self._place.loops + 1, ended=0, batches=0)
        self._loader, self._pass_began = None, {}
        try:
            with closing(self._opt.steps(steps, *self._evaluation, ahead)) as numbers:
                for number in numbers:
                    self._go_on(within=True)
                    self._turn(before + number)
                    self._taken = False
                    yield before + number
                    if not self._taken:
                        self._skip()
        except Interrupted:
            assert self._checkpoint is not None
            self._write(self._checkpoint)
            raise
        finally:
            self._place = self._place._replace(ended=1)
        self._finish()
        self._go_on()

    def _skip(self) -> None:
        """A turn ends without a step."""
        self._opt.skip()
        self._untaken += 1
        if self._untaken == _MANY_TURNS:
            turns = f"rank {self._opt.comm.rank}: {_MANY_TURNS} turns of the loop without a step"
            warnings.warn(f"{turns}: does it call {self._steps_by}?", RuntimeWarning, stacklevel=4)

    def _finish(self) -> None:
        """Wait for the other workers, and take the final center."""
        self._settle()
        self._turn(self._opt.taken)

    def _settle(self) -> None:
        """After a loop, also a `break`: all ranks know how many steps it has taken."""
        self._opt.finish()
        if self._dealing is not None:
            sampler, before = self._dealing
            sampler.start += self._opt.taken - before
            self._dealing = None

    def _batches_of(self, loader: Iterable[Batch], endless: bool) -> Iterator[Batch]:
        """The batches of `loader`, once or again and again; its iterator begins with the first: never at a center."""
        while True:
            batches = self._pass(loader)
            empty = not self._place.batches
            for batch in batches:
                empty = False
                self._place = self._place._replace(batches=self._place.batches + 1)
                yield batch
            if not endless:
                return
            if empty:
                rank = self._opt.comm.rank
                raise ValueError(f"rank {rank}: the loader has no batches, but there are steps to be taken")

    def _pass(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Begin a pass over `loader`; the first of a resumed run goes on behind the batches that were taken."""
        resumed, self._pass_resumed = self._pass_resumed, None
        if resumed is None:
            self._place = self._place._replace(passes=self._place.passes + 1, batches=0)
        else:
            self._set_randomness(_under("begin", resumed), loader)
        if set_epoch := getattr(getattr(loader, "sampler", None), "set_epoch", None):
            set_epoch(self._place.passes - 1)
        self._loader = loader
        if self._checkpoint is not None:  # else none is written within a pass, and a short pass would be slower
            self._pass_began = self._randomness(loader)
        batches = iter(loader)
        if resumed is not None:
            for _ in range(self._place.batches):
                next(batches, None)
            self._set_randomness(_under("now", resumed), loader)
        return batches

    def _state(self) -> dict[str, Array]:
        """This worker's, for a checkpoint."""
        if self._saved is not None:  # a resumed run, whose script has not come there yet
            return dict(self._saved)
        states = {"begin": self._pass_began, "now": self._randomness(self._loader), "own": self._own_state()}
        named = {f"{what}/{name}": array for what, arrays in states.items() for name, array in arrays.items()}
        return {"place": np.array(self._place), **named}

    def _resumed_with(self, saved: Mapping[str, Array]) -> None:
        """Keep what `_state` returned, until the script is where it was: what it does before would change it."""
        self._saved = saved if "place" in saved else None

    def _go_on(self, within: bool = False) -> None:
        """Put back what was saved here, or at the end of the loop that has more steps now and is gone on `within`."""
        if (saved := self._saved) is None:
            return
        place = _Place(*map(int, saved["place"]))
        loops, ended = self._place[:2]
        if (loops, ended or within) >= place[:2]:
            self._saved, self._place = None, place._replace(loops=loops, ended=ended)
            self._pass_resumed = saved if not ended and _under("begin", saved) else None
            self._set_own_state(_under("own", saved), within=not place.ended)
            self._set_randomness(_under("now", saved))

    def _randomness(self, loader: Any = None) -> dict[str, Array]:
        """The states of random generators, also of those of `loader`."""
        return randomness.state()

    def _set_randomness(self, states: Mapping[str, Array], loader: Any = None) -> None:
        """Put back what `_randomness` returned; of a loader only if it is given."""
        randomness.restore(states)

    @abstractmethod
    def _own_state(self) -> dict[str, Array]:
        """What else of this worker is saved."""

    @abstractmethod
    def _set_own_state(self, saved: Mapping[str, Array], within: bool) -> None:
        """Put back what `_own_state` returned, `within` a loop or after it."""

    def _write(self, directory: str | Path) -> None:
        """Write to `directory` what is trained, and holds the center, as the framework itself would."""

    def _turn(self, step: int) -> None:
        """Step number `step` of all loops and workers is about to be taken, or would be next."""

    def _step(self) -> None:
        """Count the step that was taken, and exchange when λ are done."""
        loss, self._taken, self._loss, self._untaken = self._loss, True, nan, 0
        self._opt.step(loss)

    def tell(self, loss: Any) -> None:
        """Tell the loss of the step that is about to be counted, for `status` and `monitor`; waits for a GPU."""
        self._loss = float(loss.detach() if hasattr(loss, "detach") else loss)

    def _monitoring(self, given: Monitoring | str | Path | None) -> Monitoring | str | Path | None:
        """As `given`, but what it evaluates is what is trained, and holds the center meanwhile."""
        function = given.evaluate if isinstance(given, Monitoring) else None
        if not isinstance(given, Monitoring) or function is None:
            return given

        @wraps(function)
        def evaluate(center: Mapping[str, Array]) -> Mapping[str, float]:
            with self._holding_parts(center) as held:
                return function(held)

        return replace(given, evaluate=evaluate)

    @contextmanager
    def center(self, file: str | Path | None = None) -> Generator[Any, None, None]:
        """Within it what is trained holds the center as this rank knows it; afterwards this rank's own again.

        Args:
            file: that of a monitored run, best.safetensors or center.safetensors, whose numbers it holds instead.
        """
        own = self._opt.center
        arrays = own if file is None else load(Path(file))[0]
        with self._holding_parts({name: arrays[name] for name in own}) as held:
            yield held

    @contextmanager
    def _holding_parts(self, center: Mapping[str, Array]) -> Generator[Any, None, None]:
        # `evaluate` and what `monitor` evaluates have a thread each.
        with self._held, self._holding(np.concatenate(list(center.values()))) as held:
            yield held

    @abstractmethod
    def _holding(self, x: Array) -> AbstractContextManager[Any]:
        """Within it what is trained holds `x` (n,)."""

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint of everything, between two loops; collective. It lies in `directory`/checkpoints."""
        self._opt.save(directory)
        self._write(directory)

    def restore(self, directory: str | Path) -> None:
        """Continue from the newest checkpoint in `directory`; collective, before the first loop.

        The loops that were complete then yield nothing, and the one that was not goes on where it was: a script is
        started again as it is. Raises ValueError if there is no checkpoint, or one of another model.
        """
        self._opt.restore(directory)

    def stop(self) -> None:
        """End the loop for all, from any rank or evaluation; as `AGNOptimizer.stop`."""
        self._opt.stop()

    @property
    def status(self) -> Status:
        """How far the run is, as this rank knows it. Never blocks."""
        return self._opt.status

    @property
    def is_center(self) -> bool:
        """Whether this rank serves, and does not train."""
        return self._opt.is_center

    @property
    def workers(self) -> int:
        """Number of workers n."""
        return self._opt.num_workers

    def close(self) -> None:
        """End it; collective. What was trained is the center."""
        if self._checkpoint is not None:
            self._opt.finish()
            self._write(self._checkpoint)
        self._opt.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error the other ranks do not call the collective close
            self.close()


def _under(what: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Those of `arrays` whose names begin with `what`/, without that."""
    return {name.removeprefix(f"{what}/"): array for name, array in arrays.items() if name.startswith(f"{what}/")}
