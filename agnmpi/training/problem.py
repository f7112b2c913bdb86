"""What the command line trains: a problem, found by its name."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..arrays.backend import Array
from ..core.batches import Plan
from ..core.params import Layout


class Problem(Protocol):
    """A model, its loss, and its data. Made by `PROBLEM(xp, **options)` on every rank.

    `xp`: numpy or cupy, the module of all arrays; `options`: the table `[options]` of the configuration.
    """

    samples: int  # training samples

    def init(self, rng: np.random.Generator) -> Mapping[str, Array]:
        """Make the initial parameters, by name; one floating dtype."""

    def gradient(self, params: Mapping[str, Array], indices: np.ndarray[Any, Any]) -> tuple[float, Mapping[str, Array]]:
        """Return the mean loss and its gradient, by name, on the training samples `indices`."""

    def evaluate(self, params: Mapping[str, Array]) -> Mapping[str, float]:
        """Return metrics on held-out data, by name. On a center rank it runs in a thread: no MPI calls."""


def load_problem(spec: str, xp: ModuleType, options: Mapping[str, Any]) -> Problem:
    """Make the problem `MODULE:PROBLEM`; MODULE is a module's name or the path of a .py file.

    Raises ValueError with the remedy if there is none; what the problem itself raises passes through.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name:
        raise ValueError(f"problem {spec!r}: give MODULE:PROBLEM, such as examples/digits.py:Digits")
    module = _module(module_name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"problem {spec!r}: {module_name} has no class or function {attribute!r}")
    problem: Problem = factory(xp, **options)
    missing = [name for name in ("samples", "init", "gradient", "evaluate") if not hasattr(problem, name)]
    if missing:
        raise ValueError(f"problem {spec!r} has no {', '.join(missing)}: see agnmpi.Problem")
    return problem


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
        spec.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise
        raise ValueError(f"no module {name!r}; for a file give its path, ending in .py") from error


def gradient_of(
    problem: Problem, layout: Layout, plan: Plan, x: Array, g: Array | None = None
) -> Callable[[int], tuple[float, Array]]:
    """Return what gives loss and gradient of a step at what `x` (n,) is then; `g` (n,) holds it, or a new vector."""
    views, g = layout.views(x), x.copy() if g is None else g

    def gradient(step: int) -> tuple[float, Array]:
        loss, gradients = problem.gradient(views, plan.indices(step))
        layout.pack(gradients, out=g)
        return float(loss), g

    return gradient
