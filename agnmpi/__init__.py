"""Asynchronous training over MPI with Accumulated Gradient Normalization (arXiv:1710.02368).

`import agnmpi` needs only numpy; AGNOptimizer and what else speaks MPI is imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

from .core import rules
from .core.optimizers import Optimizer, adagrad, adam, adamw, delayed_nesterov, momentum, nesterov, rmsprop, sgd
from .core.rules import Rule
from .core.schedules import constant, cosine, step_decay, warmup
from .training.problem import Problem
from .version import __version__

if TYPE_CHECKING:
    from .training.agn_optimizer import AGNOptimizer

__all__ = [
    "AGNOptimizer",
    "Optimizer",
    "Problem",
    "Rule",
    "__version__",
    "adagrad",
    "adam",
    "adamw",
    "constant",
    "cosine",
    "delayed_nesterov",
    "momentum",
    "nesterov",
    "rmsprop",
    "rules",
    "sgd",
    "step_decay",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name != "AGNOptimizer":
        raise AttributeError(f"module 'agnmpi' has no attribute {name!r}")
    from .training.agn_optimizer import AGNOptimizer

    return AGNOptimizer
