"""The arguments of an AGNOptimizer: their checks, and what all ranks must agree on."""

import operator
from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple

from ..core.optimizers import Optimizer
from ..core.params import Layout, named
from ..core.rules import Rule, agn, outer_rate, weighted
from ..transport.registry import Transport, resolve
from .own_arrays import one_vector


class Arguments(NamedTuple):
    """The arguments of AGNOptimizer on one rank."""

    optimizer: Optimizer | None
    center_optimizer: Optimizer | None
    params: Any
    communication_period: int
    rule: Rule | None
    variant: str
    transport: str | Transport
    buffers: Collection[str]
    outer_rate: float | None
    copy: bool

    def checked(self, use_locking: bool) -> tuple[Rule, Layout, int, Transport]:
        """The rule, the layout, λ and the transport. Raises TypeError or ValueError for invalid arguments."""
        for optimizer in (self.optimizer, self.center_optimizer):
            if optimizer is not None and not isinstance(optimizer, Optimizer):
                raise TypeError(f"optimizer must come from agnmpi (sgd, adam, …) or be None, not {optimizer!r}")
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be made by agnmpi.rules, such as rules.downpour(), not {self.rule!r}")
        if self.rule is not None and self.variant != "displacement":
            raise ValueError(f"give either a rule or variant {self.variant!r}: rules.agn({self.variant!r}) is both")
        try:
            period = operator.index(self.communication_period)
        except TypeError:
            raise TypeError(f"communication_period must be an int, not {self.communication_period!r}") from None
        if period < 1:
            raise ValueError(f"communication_period must be at least 1, not {period}")
        for key, array in named(self.params).items():
            if self.optimizer is None and not getattr(array.flags, "writeable", True):
                raise ValueError(
                    f"parameter {key!r} is read-only, but is to be updated: give a writable array "
                    "(of a PyTorch tensor: tensor.detach().numpy())"
                )
        layout = Layout.of(self.params, self.buffers, mixed=self.optimizer is None and self.copy)
        if not self.copy:
            one_vector(self.params, layout)
        rule = (self.rule or agn(self.variant))._replace(buffers=layout.buffers)
        if self.outer_rate is not None:
            if not isinstance(self.outer_rate, Real):
                raise TypeError(f"outer_rate must be a number, or None for the published n/λ, not {self.outer_rate!r}")
            rule = weighted(rule, outer_rate(self.outer_rate))
        return rule, layout, period, resolve(self.transport, rule.allreduce, use_locking)

    def facts(self, rule: Rule, period: int, transport: Transport) -> dict[str, str]:
        """What must be the same on all ranks, by name; the arguments are what `checked` has returned."""
        return {
            "rule": f"{rule.name}, alpha {rule.alpha:g}, outer rate {self.outer_rate}",
            "variant": self.variant,
            "communication_period": str(period),
            "optimizer": _describe(self.optimizer),
            "dtypes": ", ".join(f"{name} {array.dtype}" for name, array in named(self.params).items()),
            "center_optimizer": _describe(self.center_optimizer),
            "transport": f"{transport.name}, centers {transport.wanted_centers}, center on {transport.center_device}",
            "node_centers": str(transport.node_centers),
            "encodings": f"{transport.encoding}, pulls {transport.pull_encoding}",
        }


def _describe(optimizer: Optimizer | None) -> str:
    return f"{optimizer.name}({optimizer.numbers})" if optimizer else "none"
