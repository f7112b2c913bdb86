"""How workers and centers exchange, and whether a rule and a world fit that."""

from typing import NamedTuple

from mpi4py import MPI

from ..core.ends import Capabilities
from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..transport.agreement import ConfigError
from ..transport.local import LocalWorker
from .processes import fault_tolerant


class Setup(NamedTuple):
    """How workers and centers exchange.

    `use_locking`: False sums commits without a server (transport rma); `centers`: k, ranks 0 … k−1 hold a block
    each; `wire`: "staged" or "direct", of vectors on a device; `center_device`: "cpu", or "gpu" where rank 0's
    parameters lie on one; `slots`: message vectors at a p2p center; `workers`: for transport local; `dylu`: λ_k in
    proportion to the workers' speeds, by this machine's clock.
    """

    transport: str = "p2p"
    overlap: bool = False
    use_locking: bool = True
    centers: int = 1
    wire: str = "staged"
    center_device: str = "cpu"
    slots: int = 4
    workers: int = 1
    dylu: bool = False

    def count(self, size: int) -> int:
        """Number of workers n in a world of `size` ranks."""
        return size - self.centers if self.serves else self.workers if self.transport == "local" else size

    @property
    def serves(self) -> bool:
        """Whether center ranks serve and do not train."""
        return self.transport in ("p2p", "rma")


def capabilities(setup: Setup) -> Capabilities:
    """What the ends of `setup` give."""
    if setup.transport == "p2p":
        from ..transport.p2p import P2PWorker

        return P2PWorker.capabilities
    if setup.transport == "rma" and setup.use_locking:
        from ..transport.rma import RMAWorker

        return RMAWorker.capabilities
    if setup.transport == "rma":
        from ..transport.accumulate import AccumulateWorker

        return AccumulateWorker.capabilities
    if setup.transport == "allreduce":
        from ..transport.allreduce import AllreduceEnd

        return AllreduceEnd.capabilities
    if setup.transport == "local":
        return LocalWorker.capabilities
    raise ConfigError(f"unknown transport {setup.transport!r}: p2p, rma, collective or local")


def check_setup(
    rule: Rule, setup: Setup, comm: MPI.Comm, optimizer: Optimizer | None, center_optimizer: Optimizer | None
) -> None:
    """Refuse a rule on a transport, or a world, that lacks what the rule needs."""
    given, transport = capabilities(setup), setup.transport
    if rule.allreduce == given.server:
        raise ConfigError(f"rule {rule.name} cannot use transport {transport!r}; use {rule.transport!r}, or 'auto'")
    if not setup.use_locking and transport != "rma":
        raise ConfigError(f"use_locking=False needs transport 'rma'; transport {transport!r} applies whole commits")
    if not given.weights and rule.weighs:
        raise ConfigError(f"rule {rule.name} weighs commits, which use_locking=False cannot; leave use_locking on")
    if not given.center_optimizer and (center_optimizer is not None or rule.accumulates):
        raise ConfigError("use_locking=False adds commits as they are: no center optimizer; leave use_locking on")
    if setup.dylu and (rule.allreduce or not setup.use_locking):
        raise ConfigError("dylu needs a center that grants the work: not a collective rule, nor use_locking=False")
    if setup.centers < 1:
        raise ConfigError(f"centers must be at least 1, not {setup.centers}")
    if setup.centers > 1 and not setup.serves:
        raise ConfigError(f"centers = {setup.centers} needs transport p2p or rma; {transport!r} has no center ranks")
    if setup.serves and comm.size < setup.centers + 1:
        ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
        raise ConfigError(
            f"rule {rule.name} needs {'a center' if setup.centers == 1 else f'{setup.centers} centers'} and at least "
            f"one worker, but the world has {ranks}: start it with mpiexec -n {setup.centers + 3} (or more), or train "
            "in one process with transport local"
        )
    if setup.center_device == "gpu" and transport != "p2p":
        raise ConfigError(f"a center on a GPU needs transport p2p, not {transport!r}: windows lie in host memory")
    if transport == "local" and comm.size > 1:
        raise ConfigError(f"transport local is one process, but mpiexec started {comm.size} ranks")
    if optimizer is None and rule.accumulates:
        raise ConfigError("variant 'gradient' needs the gradients: give an optimizer, or use 'displacement'")
    if setup.overlap and transport == "local":
        raise ConfigError("overlap has no meaning on transport local: its exchanges take no time")


def survives(setup: Setup) -> bool:
    """Whether workers and the center outlive each other: MPI says who has died, and messages are two-sided."""
    return setup.transport == "p2p" and setup.centers == 1 and fault_tolerant()
