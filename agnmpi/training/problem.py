"""Problems that the command line trains, loaded by name."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..arrays.backend import Array, choose, current
from ..core.batches import Plan
from ..core.params import Layout
from ..core.rules import Rule
from .config import Config
from .user_code import UserCodeError, blamed, metrics, pack_gradients, user_frames


class Problem(Protocol):
    """What `agnmpi train` trains: a model, its loss and its data, in a class that you write.

    Every rank creates it once, as `PROBLEM(xp, **options)`, and then calls its methods; it needs no base class, and
    it does not use MPI. Write `module.py:PROBLEM` on the command line.

    Args:
        xp: numpy, or cupy where this rank computes on a GPU: the module for creating arrays.
        **options: from `--set options.KEY=VALUE`, or the table [options] of a file.

    It may also have:
        prepare(indices): loads or transforms a batch; `gradient` is given what it returns in place of the indices. It
            runs in a thread, up to a period of λ steps ahead (with rules `synchronous` and `diloco` within a period),
            on ranks that train alone. It must not use the parameters, nor MPI.
        sort_indices: True for the indices of a batch in ascending order, as h5py wants them.
        epochs: how many it takes to learn, for runs that are not told how many to train.

    What only training needs is best read at first use, in a `functools.cached_property`: a center rank never calls
    `gradient` or `prepare`, and needs but the number `samples`, which a file's header may tell.

    A complete example, the line y = 3x through noisy samples:

    >>> class Line:
    ...     samples = 1000
    ...     def __init__(self, xp, noise=0.1):
    ...         rng = np.random.default_rng(0)  # every rank creates, or reads, the same data
    ...         self.x = xp.asarray(rng.uniform(-1, 1, self.samples))
    ...         self.y = 3 * self.x + noise * xp.asarray(rng.normal(size=self.samples))
    ...     def init(self, rng):
    ...         return {"slope": rng.normal(size=1)}
    ...     def gradient(self, params, indices):
    ...         x, error = self.x[indices], params["slope"] * self.x[indices] - self.y[indices]
    ...         return (error**2).mean(), {"slope": 2 * (error * x).mean(keepdims=True)}
    ...     def evaluate(self, params):
    ...         return {"slope": float(params["slope"][0])}

    What a worker does with it, here with plain SGD:

    >>> line, rng = Line(np), np.random.default_rng(1)
    >>> params = line.init(rng)
    >>> for _ in range(100):
    ...     loss, gradient = line.gradient(params, rng.integers(line.samples, size=32))
    ...     params["slope"] -= 0.3 * gradient["slope"]
    >>> round(line.evaluate(params)["slope"], 1)
    3.0
    """

    samples: int  # number of training samples, the same on every rank

    def init(self, rng: np.random.Generator) -> Mapping[str, Array]:
        """Make the initial parameters.

        Args:
            rng: a generator seeded by `--seed`, in the same state on every rank.

        Returns:
            Arrays by name, of any shapes and one floating dtype (float32 or float64), numpy's or cupy's. Names,
            shapes and dtype are the same on every rank; the values of rank 0 are used.
        """

    def gradient(self, params: Mapping[str, Array], indices: np.ndarray[Any, Any]) -> tuple[float, Mapping[str, Array]]:
        """Compute one step.

        Args:
            params: the parameters now, by name, shaped as `init` made them: views, not to be changed or kept.
            indices: (batch,) numbers of training samples, int64 on the host, from 0 to samples − 1; the last step
                of an epoch may have fewer. Or what `prepare` has returned.

        Returns:
            The mean loss over these samples, and its gradient: arrays by name, shaped as the parameters.
        """

    def evaluate(self, params: Mapping[str, Array]) -> Mapping[str, float]:
        """Measure the model on held-out data.

        On a center rank it runs in a thread while the center serves: it must not call MPI, nor change what
        `gradient` uses.

        Args:
            params: a copy of the center variable, by name, shaped as `init` made the parameters.

        Returns:
            Numbers by name, such as {"accuracy": 0.98}, for the display and the run's files.
        """


Factory: TypeAlias = Callable[..., Problem]


def load_problem(spec: str, xp: ModuleType, options: Mapping[str, Any], factory: Factory | None = None) -> Problem:
    """Create a problem.

    Args:
        spec: MODULE:PROBLEM; MODULE is a module's name or the path of a .py file.
        xp: numpy or cupy.
        options: its keyword arguments.
        factory: makes it; then `spec` is only its name.

    Raises:
        ValueError: with the remedy, if there is no such problem; UserCodeError, which is one, with the frames of the
            problem's own code, if that fails.
    """
    needed = ("samples", "init", "gradient", "evaluate")
    problem: Problem = load(spec, (xp,), options, needed, "agnmpi.Problem", factory)
    return problem


def load(
    spec: str, given: Sequence[Any], options: Mapping[str, Any], needed: Sequence[str], described: str,
    factory: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """Create the object `spec` as `PROBLEM(*given, **options)`; as `load_problem`.

    `needed`: attributes that it must have, as `described` says.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name:
        raise ValueError(f"problem {spec!r}: give MODULE:PROBLEM, such as examples/digits.py:Digits")
    factory = factory or getattr(_module(module_name), attribute, None)
    if not callable(factory):
        raise ValueError(f"problem {spec!r}: {module_name} has no class or function {attribute!r}")
    with blamed(f"problem {spec!r} cannot be made; it is called as {attribute}{_signature(factory)}"):
        problem = factory(*given, **options)
    missing = [name for name in needed if not hasattr(problem, name)]
    if missing:
        raise ValueError(f"problem {spec!r} has no {', '.join(missing)}: see {described}")
    return problem


def _signature(factory: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(factory))
    except (TypeError, ValueError):
        return "(xp, …)"


def prepare(
    spec: str,
    options: Mapping[str, Any],
    seed: int,
    device: str,
    local_index: int,
    factory: Factory | None = None,
) -> tuple[Problem, Layout, Array]:
    """Create the problem `spec` and its initial parameters.

    Args:
        spec: MODULE:PROBLEM.
        options: its keyword arguments.
        seed: of the parameters.
        device: "cpu", "gpu" or "auto".
        local_index: of this worker among those of its node, which share the devices.
        factory: makes it; then `spec` is only its name.

    Returns:
        The problem, the layout of its parameters, and their flat vector (n,).
    """
    problem = load_problem(spec, choose(device, local_index), options, factory)
    with blamed(f"init of problem {spec!r} failed"):
        initial = problem.init(np.random.default_rng(seed))
    if initial is None:
        raise UserCodeError(f"init of problem {spec!r} must return arrays by name, not None: a `return` is missing")
    layout = Layout.of(initial)
    return problem, layout, layout.pack(initial)


def plan_of(problem: Problem, config: Config) -> Plan:
    """The batches of a run; raises ValueError for numbers that make none."""
    epochs = getattr(problem, "epochs", 1.0) if config.epochs is None else config.epochs
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not epochs > 0:
        raise ValueError(f"problem {config.problem!r}: its epochs must be a positive number, not {epochs!r}")
    return Plan(problem.samples, config.batch, epochs, config.steps, config.seed)


def data_of(plan: Plan, config: Config) -> dict[str, int]:
    """What determines the samples of each step."""
    return {"samples": plan.samples, "batch": config.batch, "seed": config.seed}


def evaluate(problem: Problem, params: Mapping[str, Array]) -> dict[str, float]:
    """The metrics of a problem; raises UserCodeError where `evaluate` returns something else."""
    return metrics(problem.evaluate(params), problem.evaluate)


def name_of(factory: Factory) -> str:
    """MODULE:PROBLEM of a class or function; of a script's own, with its file.

    Raises ValueError for what cannot be found by a name again.
    """
    module, name = factory.__module__, getattr(factory, "__qualname__", "")
    if "<" in name or not name:
        raise ValueError(f"{factory!r} has no name by which a run could find it again: define it in a module")
    file = getattr(sys.modules.get(module), "__file__", None) if module == "__main__" else None
    return f"{file or module}:{name}"


def absolute(spec: str) -> str:
    """Return `spec` with the path of its file, if it is one, made absolute."""
    module_name, colon, attribute = spec.rpartition(":")
    if module_name.endswith(".py"):
        return f"{Path(module_name).resolve()}{colon}{attribute}"
    return spec


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"problem file {path} does not exist (seen from {Path.cwd()})")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        with blamed(f"problem file {path} cannot be imported"):
            spec.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise UserCodeError(f"module {name!r} cannot be imported:\n{user_frames(error)}") from error
        raise ValueError(f"no module {name!r}; for a file give its path, ending in .py") from error
    except Exception as error:
        raise UserCodeError(f"module {name!r} cannot be imported:\n{user_frames(error)}") from error


class Batches:
    """What `gradient` is given in each step: the indices of its samples, or what `prepare` makes of them.

    Args:
        problem: whose `prepare` it is, if it has one.
        plan: which samples belong to a step.
        x: (n,) parameters, on the device of which `prepare` is to allocate.
        granted: the numbers of the steps to come, that being taken first: their batches are prepared in a thread. None:
            each is prepared when it is due.
        most: how many batches are prepared and not used yet.
    """

    def __init__(
        self, problem: Problem, plan: Plan, x: Array, granted: Callable[[], Sequence[int]] | None = None, most: int = 0
    ) -> None:
        self._prepare: Callable[[Any], Any] | None = getattr(problem, "prepare", None)
        self._sorted = bool(getattr(problem, "sort_indices", False))
        self._plan, self._x, self._granted, self._most = plan, x, granted, most
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare") if granted and self._prepare else None
        self._prepared = dict[int, Future[Any]]()

    def __call__(self, step: int) -> Any:
        """The batch of `step`; raises what `prepare` has raised."""
        if self._prepare is None:
            return self._indices(step)
        if self._pool is None:
            return self._prepare(self._indices(step))
        assert self._granted is not None
        steps = dict.fromkeys([step, *self._granted()[: self._most + 1]])
        for other in self._prepared.keys() - steps.keys():  # granted to another worker meanwhile
            self._prepared.pop(other).cancel()
        for other in steps:
            if other not in self._prepared:
                self._prepared[other] = self._pool.submit(self._load, self._indices(other))
        return self._prepared.pop(step).result()

    def close(self) -> None:
        """Nothing more is prepared."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _indices(self, step: int) -> Any:
        indices = self._plan.indices(step)
        return np.sort(indices) if self._sorted else indices

    def _load(self, indices: Any) -> Any:
        assert self._prepare is not None
        with current(self._x):
            return self._prepare(indices)


def leases_ahead(problem: Problem, rule: Rule, record: bool) -> int:
    """Leases that a worker holds beyond the one that it computes: one, where their batches can be prepared.

    Not in a round of all ranks, whose work is known when it begins; a record has the messages of workers without.
    """
    return int(hasattr(problem, "prepare") and not rule.allreduce and not record)


def gradient_of(
    problem: Problem, layout: Layout, plan: Plan, x: Array, g: Array | None = None, batches: Batches | None = None
) -> Callable[[int], tuple[float, Array]]:
    """Return a function of a step: loss and gradient at the current `x` (n,); the gradient is written to `g` (n,).

    `batches`: what the problem is given; by default its indices, or what it prepares when that is due.
    """
    views, g = layout.views(x), x.copy() if g is None else g
    batch = batches or Batches(problem, plan, x)

    def gradient(step: int) -> tuple[float, Array]:
        return pack_gradients(problem.gradient(views, batch(step)), layout, problem.gradient, g), g

    return gradient
