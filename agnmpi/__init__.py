"""Asynchronous training over MPI with Accumulated Gradient Normalization (arXiv:1710.02368).

In your own training loop: `AGNOptimizer`, with an optimizer (`sgd` … `adamw`, or your own `Optimizer`), a rule of
exchange (`rules`), a rate schedule (`schedules`) and a transport (`transports`). As a whole run, as the command line
does it: `train` and, in virtual time without ranks, `simulate`, both of a `Problem` and a `Config`; `join` adds workers
to a run. A model of PyTorch: `agnmpi.torch.Run`; a pytree of JAX: `agnmpi.jax.Run`. A solver that trains a surrogate of
itself: `insitu.Run`.

`import agnmpi` needs only numpy. Modules that use MPI are imported, and MPI initialised, at first use.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .core import rules, schedules
from .core.optimizers import Optimizer, adagrad, adam, adamw, momentum, nesterov, optimistic, rmsprop, sgd
from .core.rules import Rule
from .version import __version__

if TYPE_CHECKING:
    from . import insitu
    from .cli.join import join
    from .loops.agn_optimizer import AGNOptimizer
    from .loops.monitoring import Monitoring
    from .simulation.simulate import simulate
    from .training.config import Config
    from .training.exits import Degraded, Failed, Interrupted, Unwritten
    from .training.job import train
    from .training.problem import Problem
    from .transport import registry as transports
    from .transport.agreement import ConfigError

__all__ = [
    "AGNOptimizer",
    "Config",
    "ConfigError",
    "Degraded",
    "Failed",
    "Interrupted",
    "Monitoring",
    "Optimizer",
    "Problem",
    "Rule",
    "Unwritten",
    "__version__",
    "adagrad",
    "adam",
    "adamw",
    "insitu",
    "join",
    "momentum",
    "nesterov",
    "optimistic",
    "rmsprop",
    "rules",
    "schedules",
    "sgd",
    "simulate",
    "train",
    "transports",
]

# Public names that are imported when first used: module, and the name in it (None: the module itself).
_LAZY: dict[str, tuple[str, str | None]] = {
    "AGNOptimizer": (".loops.agn_optimizer", "AGNOptimizer"),
    "Config": (".training.config", "Config"),
    "ConfigError": (".transport.agreement", "ConfigError"),
    "Degraded": (".training.exits", "Degraded"),
    "Failed": (".training.exits", "Failed"),
    "Interrupted": (".training.exits", "Interrupted"),
    "Monitoring": (".loops.monitoring", "Monitoring"),
    "Unwritten": (".training.exits", "Unwritten"),
    "Problem": (".training.problem", "Problem"),
    "insitu": (".insitu", None),
    "jax": (".jax", None),
    "join": (".cli.join", "join"),
    "simulate": (".simulation.simulate", "simulate"),
    "torch": (".torch", None),
    "train": (".training.job", "train"),
    "transports": (".transport.registry", None),
}
# So that `from agnmpi.schedules import cosine` works, too.
sys.modules |= {f"{__name__}.rules": rules, f"{__name__}.schedules": schedules}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    imported = importlib.import_module(module, __name__)
    value = imported if attribute is None else getattr(imported, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
