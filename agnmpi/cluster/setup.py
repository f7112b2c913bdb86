"""How workers and centers exchange in a session, and checks that rule, transport and world fit together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mpi4py import MPI

from ..core.optimizers import Optimizer
from ..core.rules import Rule
from ..transport.agreement import ConfigError
from ..transport.registry import Transport, names_with, p2p, refusals_of_encodings, refusals_of_going_on
from .placement import Place, fault_tolerant, hosts, node_centers, one_center_per_host, place

LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


class Setup(NamedTuple):
    """How workers and centers exchange.

    Args:
        transport: how commits travel.
        overlap: compute the next period while the exchange of the last is under way.
        wait: False, with overlap: while that exchange is under way, go on after λ steps.
        dylu: λ_k in proportion to the workers' speeds, by this machine's clock.
        caller_uses_mpi: whether this program calls MPI by itself while it computes.
        placed: ranks of the centers, in order of their blocks, rank 0 first; empty: ranks 0 … k−1.
        nodes: of each host with a node center: its rank, and those of its workers.
    """

    transport: Transport = p2p()
    overlap: bool = False
    dylu: bool = False
    caller_uses_mpi: bool = True
    placed: tuple[int, ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()
    wait: bool = True

    @property
    def center_ranks(self) -> Sequence[int]:
        """The ranks that hold the center variable, in order of their blocks; empty where all train."""
        return self.placed or range(self.transport.serving_ranks)

    @property
    def serving_ranks(self) -> Sequence[int]:
        """The ranks that serve and do not train: the centers, then the node centers."""
        return [*self.center_ranks, *(node for node, *_ in self.nodes)]

    def workers(self, size: int) -> list[int]:
        """The ranks of the workers in a world of `size`, by number: those of the center, then each node center's."""
        of_nodes = [rank for _, *workers in self.nodes for rank in workers]
        others = set(self.serving_ranks).union(of_nodes)
        return [*(rank for rank in range(size) if rank not in others), *of_nodes]

    def is_spare(self, rank: int, size: int) -> bool:
        """Whether this rank of `size` trains only when another is lost."""
        return rank >= size - self.transport.spares

    def place(self, comm: MPI.Comm) -> Place:
        """This rank's place among the ranks of its node, by what it does; collective."""
        return place(comm, comm.rank not in self.serving_ranks, self.is_spare(comm.rank, comm.size))

    def on_hosts(self, comm: MPI.Comm) -> "Setup":
        """The same, with a center, or a node center, on each host if the transport wants that; always collective."""
        names = hosts(comm)
        if self.transport.node_centers and self.transport.capabilities.node_centers:
            return self._replace(nodes=tuple(node_centers(names)))
        ranks = one_center_per_host(names)
        if not (self.transport.center_per_host and self.transport.capabilities.shards):
            return self
        return self._replace(transport=replace(self.transport, centers=len(ranks)), placed=tuple(ranks))

    def beginning(self, size: int) -> "Setup":
        """The same, for `size` ranks: the center's state is replicated if workers and center survive each other's loss.

        And the number of workers that spares are to keep up is known.
        """
        transport = replace(self.transport, replicates_state=outlives_loss(self.transport))
        kept = size - 1 - transport.spares if transport.spares else 0
        return self._replace(transport=replace(transport, kept=kept))

    @property
    def threaded(self) -> bool:
        """Whether the exchanges of a worker run in a thread of their own."""
        return self.overlap and not self._obstacle

    @property
    def unthreaded(self) -> str:
        """What it means where exchanges overlap and cannot run in a thread, why, and what helps; empty elsewhere."""
        if not self.overlap or self.threaded:
            return ""
        return f"overlapping exchanges advance between two steps alone: {self._obstacle}"

    @property
    def _obstacle(self) -> str:
        """Why there can be no thread for exchanges; empty if there can."""
        if self.transport.capabilities.together:
            return f"the rounds of transport {self.transport.name} apply their sum where they train"
        level, needed = MPI.Query_thread(), MPI.THREAD_MULTIPLE if self.caller_uses_mpi else MPI.THREAD_SERIALIZED
        # One thread that alone calls MPI is safe there: 16 of 16 random schedules of kills (Open MPI 5.0.11).
        if fault_tolerant() and MPI.THREAD_MULTIPLE in (level, needed):
            return "with ULFM no two threads may use MPI, and its thread level must be below 'multiple'"
        if level >= needed:
            return ""
        return (
            f"MPI was initialized with thread level {LEVELS[level]!r}: set MPI4PY_RC_THREAD_LEVEL={LEVELS[needed]}, or "
            f"give MPI_Init_thread that level"
        )


def outlives_loss(transport: Transport) -> bool:
    """Whether workers and the center survive each other's loss: MPI reports failed ranks, and there is one center."""
    return transport.capabilities.outlives_loss and transport.centers == 1 and fault_tolerant()


def check_setup(
    rule: Rule, setup: Setup, size: int, optimizer: Optimizer | None, center_optimizer: Optimizer | None
) -> None:
    """Refuse a rule on a transport, or a world of `size` ranks, that lacks what the rule needs.

    Raises:
        ConfigError: on every rank, since all pass the same.
    """
    for refused, message in _refusals(rule, setup, size, optimizer, center_optimizer):
        if refused:
            raise ConfigError(message)


def _refusals(
    rule: Rule, setup: Setup, size: int, optimizer: Optimizer | None, center_optimizer: Optimizer | None
) -> list[tuple[bool, str]]:
    transport, caps = setup.transport, setup.transport.capabilities
    name, centers = transport.name, transport.centers
    suitable = names_with("together") if rule.allreduce else names_with("center_ranks")
    in_one_process = not (caps.center_ranks or caps.together)
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    adds_only, locking = f"transport {name!r} adds commits as they are", names_with("single_commits", "center_ranks")
    return [
        (rule.allreduce != caps.together, f"rule {rule.name} cannot use transport {name!r}; use {suitable}, or 'auto'"),
        (
            rule.weighs and not caps.single_commits,
            f"rule {rule.name} weighs commits here, but {adds_only}: use transport {locking}, or leave out what "
            "weighs them (staleness_cap, staleness_power, an outer_rate that is a number)",
        ),
        (
            (center_optimizer is not None or rule.accumulates) and not caps.single_commits,
            f"{adds_only}: no center optimizer, and no variant 'gradient'; use transport {locking}",
        ),
        (
            bool(rule.buffers) and not caps.single_commits,
            f"buffers are averaged, but {adds_only}: use transport {names_with('single_commits')}; or layers without "
            "buffers (GroupNorm for BatchNorm)",
        ),
        *refusals_of_encodings(rule, transport.encoding, transport.pull_encoding),
        (
            setup.dylu and (caps.together or not caps.single_commits),
            f"dylu needs a center that grants the work, which transport {name!r} has not",
        ),
        *([] if setup.wait else refusals_of_going_on(rule, transport)),
        *_refusals_of_node_centers(rule, setup, center_optimizer),
        (
            (centers > 1 or transport.center_per_host) and not caps.shards,
            f"centers = {transport.wanted_centers!r} needs transport {names_with('shards')}; {name!r} has no center "
            "ranks: give 1",
        ),
        (
            caps.center_ranks and size < centers + 1,
            f"rule {rule.name} needs {'a center' if centers == 1 else f'{centers} centers'} and at least one worker, "
            f"but the world has {ranks}: start it with mpiexec -n {centers + 3} (or more), or train in one process "
            "with transport local",
        ),
        (
            in_one_process and size > 1,
            f"transport {name} is one process, but mpiexec started {ranks}",
        ),
        (
            optimizer is None and rule.accumulates,
            "variant 'gradient' needs the gradients: give an optimizer, or use 'displacement'",
        ),
        (
            outlives_loss(transport) and transport.pull_encoding in ("int8", "int4"),
            f"pull_encoding {transport.pull_encoding} with ULFM: a worker that takes over would begin from rounded "
            "numbers; use float32 or bf16",
        ),
        (
            transport.spares > 0 and not outlives_loss(transport),
            f"spares = {transport.spares} take the places of lost ranks: start it with mpiexec --with-ft ulfm "
            "(Open MPI), transport p2p and one center",
        ),
        (
            transport.spares > 0 and transport.pull_encoding != "float32",
            "spares end with the center as they pull it: leave pull_encoding",
        ),
        (
            0 < transport.spares > size - 2,
            f"spares = {transport.spares} of {ranks} leave no worker beside the center: start more, or give fewer",
        ),
        (
            caps.windows and fault_tolerant(),
            f"transport {name} under mpiexec --with-ft ulfm: in its windows Open MPI may hang for ever when a rank "
            "dies; leave the option out, or use transport p2p",
        ),
        (
            setup.overlap and not caps.overlap,
            f"overlap has no meaning on transport {name}: its exchanges take no time",
        ),
    ]


def _refusals_of_node_centers(rule: Rule, setup: Setup, center_optimizer: Optimizer | None) -> list[tuple[bool, str]]:
    if not setup.transport.node_centers:
        return []
    transport, remedy = setup.transport, "leave out node_centers"
    return [
        (
            not transport.capabilities.node_centers,
            f"node_centers needs transport {names_with('node_centers')}, not {transport.name!r}",
        ),
        (
            transport.centers > 1 or transport.center_per_host,
            f"node_centers with centers = {transport.wanted_centers!r}: a node center exchanges with one center; leave "
            "one of them",
        ),
        (
            rule.pulls == "before",
            f"rule {rule.name} ties each worker to the center by a spring, and a node center adds commits up: {remedy}",
        ),
        (
            center_optimizer is not None or rule.accumulates,
            "a node center adds commits up, but a center optimizer takes a step for each: leave out center_optimizer, "
            "or node_centers",
        ),
        (setup.dylu, "dylu compares the speeds of all workers, and a node center hides those of its host: leave one"),
        (
            fault_tolerant(),
            f"node_centers with ULFM: workers cannot go on yet without the node center of their host; {remedy}, or "
            "start without --with-ft ulfm",
        ),
    ]
