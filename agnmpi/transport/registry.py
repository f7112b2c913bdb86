"""The transports: one entry each, with its name, its capabilities and the factories of its ends.

Nothing else compares transport names: rules, setup, configuration, bench and tests ask for capabilities. In Python a
transport is an object, made by the function of its name, `agnmpi.transports.p2p(message_buffers=8)`; the command line
and TensorFlow's `use_locking` name it by a string.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..arrays.backend import Array
from ..arrays.encodings import get
from ..core.ends import Apply, Capabilities, CenterEnd, WorkerEnd
from ..core.rules import Rule
from .staging import MAX_CALL_BYTES, make_wire

if TYPE_CHECKING:
    from mpi4py import MPI

    from .allreduce import AllreduceEnd


# A number, or one on each host.
Centers: TypeAlias = int | Literal["hosts"]


@dataclass(frozen=True)
class Transport:
    """How commits travel, with its options.

    Args:
        name: on the command line and in logs.
        about: a short description, in the help of the command line.
        capabilities: what it offers.
        make_worker: `(comm, like, transport)`: the end of a worker; `like`: a vector like what it exchanges (n,).
        make_center: `(comm, c, transport)`: the end of the center, rank 0 of `comm`.
        make_peer: `(comm, c, apply)`: the end of a rank, where all exchange together.
        floor: the bare MPI calls that transfer the same bytes, for `agnmpi bench`.
        centers: k, ranks that hold a block of the center variable each.
        center_per_host: k is the number of hosts, once the ranks are known: a center on each, beside its workers.
        node_centers: on each host beside the center's a rank sums the commits of its workers, and sends these sums.
        numbers: of the workers of a center, where they are not 0, 1, …; set for the parts of a tree.
        message_buffers: vectors at the center for messages in flight.
        wire: of vectors on a device: "staged" through pinned host memory, "direct" with CUDA-aware MPI, or "auto".
        center_device: "gpu" keeps the center where rank 0's parameters lie, else "cpu".
        workers: where all of them run in one process.
        spares: the last ranks, which take the places of lost ones (ULFM).
        kept: the number of workers that spares keep up; set at the beginning. 0: all are workers.
        replicates_state: replies hold the center's state beside c, so that a worker can take over.
        encoding: of commits on the wire, a name of `arrays.encodings`.
        pull_encoding: of pulls.
    """

    name: str
    about: str
    capabilities: Capabilities
    make_worker: "Callable[[MPI.Comm, Array, Transport], WorkerEnd] | None" = None
    make_center: "Callable[[MPI.Comm, Array, Transport], CenterEnd] | None" = None
    make_peer: "Callable[[MPI.Comm, Array, Apply], AllreduceEnd] | None" = None
    floor: str = ""
    centers: int = 1
    center_per_host: bool = False
    node_centers: bool = False
    numbers: tuple[int, ...] = ()
    message_buffers: int = 4
    wire: str = "auto"
    center_device: str = "cpu"
    workers: int = 1
    spares: int = 0
    kept: int = 0
    replicates_state: bool = False
    encoding: str = "float32"
    pull_encoding: str = "float32"

    def __post_init__(self) -> None:
        for name in ("centers", "message_buffers", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if self.spares < 0:
            raise ValueError(f"spares must not be negative, but is {self.spares!r}")
        if self.center_device == "gpu" and not self.capabilities.device_center:
            raise ValueError(f"a center on a GPU needs transport {names_with('device_center')}, not {self.name}")
        for name in ("encoding", "pull_encoding"):
            if not get(getattr(self, name)).exact and not self.capabilities.encodings:
                raise ValueError(
                    f"{name} {getattr(self, name)} needs transport {names_with('encodings')}: with {self.name} MPI "
                    "itself adds the numbers, and cannot add encoded ones"
                )

    @property
    def wanted_centers(self) -> Centers:
        """The option `centers`, as it was given."""
        return "hosts" if self.center_per_host else self.centers

    @property
    def serving_ranks(self) -> int:
        """Ranks that serve and do not train."""
        return self.centers if self.capabilities.center_ranks else 0

    def workers_among(self, size: int) -> int:
        """Number of workers n in a world of `size` ranks."""
        if self.capabilities.center_ranks or self.capabilities.together:
            return min(size - self.serving_ranks, self.kept or size)
        return self.workers


def _p2p_worker(comm: "MPI.Comm", like: Array, transport: Transport) -> WorkerEnd:
    from .p2p import P2PWorker

    number = transport.numbers[comm.rank - 1] if transport.numbers else None
    return P2PWorker(comm, make_wire(like, transport.wire), transport.replicates_state, number)


def _p2p_center(comm: "MPI.Comm", c: Array, transport: Transport) -> CenterEnd:
    from .p2p_center import P2PCenter

    options = transport.message_buffers, transport.wire, transport.pull_encoding, transport.numbers
    return P2PCenter(comm, c, *options, kept=transport.kept)


def _rma_worker(comm: "MPI.Comm", like: Array, transport: Transport) -> WorkerEnd:
    from .rma import RMAWorker

    wire, encodings = make_wire(like, transport.wire), (transport.encoding, transport.pull_encoding)
    return RMAWorker(comm, like, wire, MAX_CALL_BYTES, *encodings)


def _rma_center(comm: "MPI.Comm", c: Array, transport: Transport) -> CenterEnd:
    from .rma import RMACenter

    return RMACenter(comm, c, MAX_CALL_BYTES, transport.encoding, transport.pull_encoding)


def _accumulate_worker(comm: "MPI.Comm", like: Array, _transport: Transport) -> WorkerEnd:
    from .accumulate import AccumulateWorker

    return AccumulateWorker(comm, like, make_wire(like, "staged"))  # Open MPI refuses device buffers in Accumulate


def _accumulate_center(comm: "MPI.Comm", c: Array, _transport: Transport) -> CenterEnd:
    from .accumulate import AccumulateCenter

    return AccumulateCenter(comm, c)


def _allreduce_peer(comm: "MPI.Comm", c: Array, apply: Apply) -> "AllreduceEnd":
    from .allreduce import AllreduceEnd

    # Open MPI's nonblocking collectives take no device pointers.
    return AllreduceEnd(comm, c, apply, make_wire(c, "staged"))


_ENTRIES: dict[str, Transport] = {}
ALIASES = {"serverless": "accumulate", "collective": "allreduce"}  # names of earlier versions


def register(transport: Transport) -> None:
    """Make a transport known to setup, the command line, bench and the conformance suite."""
    _ENTRIES[transport.name] = transport


def unregister(name: str) -> None:
    """Forget a transport. Raises KeyError for an unknown name."""
    del _ENTRIES[name]


register(
    Transport(
        "p2p",
        "messages, the center applies one whole commit after the other",
        Capabilities(
            center_ranks=True, message_order=True, shards=True, node_centers=True, silent_workers=True,
            outlives_loss=True, device_center=True, direct=True, encodings=True,
        ),
        make_worker=_p2p_worker,
        make_center=_p2p_center,
        floor="two-sided",
    )
)  # fmt: skip
register(
    Transport(
        "rma",
        "one-sided windows, a mailbox at the center for each worker",
        Capabilities(center_ranks=True, shards=True, direct=True, encodings=True, windows=True),
        make_worker=_rma_worker,
        make_center=_rma_center,
        floor="mailbox",
    )
)
register(
    Transport(
        "accumulate",
        "one-sided windows, workers sum into the center themselves",
        Capabilities(
            center_ranks=True, whole_pulls=False, exact_clock=False, single_commits=False, shards=True, windows=True
        ),
        make_worker=_accumulate_worker,
        make_center=_accumulate_center,
        floor="sum",
    )
)
register(
    Transport(
        "allreduce",
        "all ranks train, and exchange together",
        Capabilities(together=True),
        make_peer=_allreduce_peer,
        floor="allreduce",
    )
)
register(
    Transport("local", "all workers in one process", Capabilities(message_order=True, overlap=False, encodings=True))
)


def entries() -> Iterator[Transport]:
    """All transports, with their defaults."""
    return iter(_ENTRIES.values())


def names() -> list[str]:
    """The names on the command line."""
    return ["auto", *_ENTRIES]


def names_with(*capabilities: str) -> str:
    """The transports with all of `capabilities`, as text for a message.

    >>> names_with("together"), names_with("single_commits", "center_ranks")
    ('allreduce', 'p2p or rma')
    """
    found = (entry for entry in _ENTRIES.values() if all(getattr(entry.capabilities, name) for name in capabilities))
    return " or ".join(entry.name for entry in found)


def resolve(
    transport: str | Transport, together: bool = False, use_locking: bool = True, **options: int | str
) -> Transport:
    """Look up a transport.

    Args:
        transport: an object, a name, or "auto": what the rule needs.
        together: whether the rule exchanges on all ranks at the same time.
        use_locking: TensorFlow's option; False turns "rma" into "accumulate".
        options: fields of `Transport` for a name; an object has its own.

    Raises:
        ValueError: for an unknown name, options beside an object, or what the transport cannot do.
    """
    if isinstance(transport, Transport):
        if use_locking or (name := locked(transport.name, use_locking)) == transport.name:
            return transport
        return replace(_ENTRIES[name], centers=transport.centers, center_per_host=transport.center_per_host)
    name = ALIASES.get(transport, transport)
    if name == "auto":
        name = "allreduce" if together else "p2p"
    if not use_locking:
        name = locked(name, use_locking)
    if name not in _ENTRIES:
        raise ValueError(f"unknown transport {transport!r}: give {', '.join(_ENTRIES)} or auto")
    if options.get("centers") == "hosts":
        options |= {"centers": 1, "center_per_host": True}
    elif not isinstance(options.get("centers", 1), int):
        raise ValueError(f"centers must be a number of at least 1, or 'hosts', not {options['centers']!r}")
    return replace(_ENTRIES[name], **options)  # type: ignore[arg-type]


def locked(name: str, use_locking: bool) -> str:
    """What a name means with TensorFlow's `use_locking`: without it "rma" is "accumulate".

    Raises:
        ValueError: for a transport that does not go with it.
    """
    if use_locking and name == "accumulate":
        raise ValueError("transport 'accumulate' sums without locking; for whole commits use transport 'rma'")
    if not use_locking and name not in ("rma", "accumulate"):
        raise ValueError(f"use_locking=False needs transport 'rma', and means 'accumulate'; it is {name!r}")
    return name if use_locking else "accumulate"


def p2p(
    centers: Centers = 1, message_buffers: int = 4, wire: str = "auto", center_device: str = "cpu",
    encoding: str = "float32", pull_encoding: str = "float32", node_centers: bool = False, spares: int = 0,
) -> Transport:  # fmt: skip
    """Two-sided messages: the center applies one whole commit after the other; the default, the best across hosts.

    Args:
        centers: k, ranks 0 … k−1 hold a block of the center variable each; a pull is then whole per block. "hosts":
            one rank on each host, beside the workers there, so that a link carries 1/k of what one center's does.
        message_buffers: vectors at the center for incoming deltas and outgoing replies.
        wire: of vectors on a GPU: "staged", "direct" with CUDA-aware MPI, or "auto".
        center_device: "cpu", or "gpu" to keep the center where rank 0's parameters lie.
        encoding: of commits: "float32", as they are; "bf16", "int8" or "int4", with error feedback.
        pull_encoding: of pulls, likewise, without.
        node_centers: whether, on each host of three ranks or more beside the center's, the lowest rank adds up the
            commits of the others and exchanges their sums with the center; encodings are of these sums. Default False.
        spares: k, the last ranks wait, without work, and each takes the place of a lost one at once (ULFM). Default 0.

    Raises:
        ValueError: for a number below 1 (spares: 0), or an unknown encoding.
    """
    return resolve(
        "p2p", centers=centers, message_buffers=message_buffers, wire=wire, center_device=center_device,
        encoding=encoding, pull_encoding=pull_encoding, node_centers=node_centers, spares=spares,
    )  # fmt: skip


def rma(
    centers: Centers = 1, wire: str = "auto", encoding: str = "float32", pull_encoding: str = "float32"
) -> Transport:
    """One-sided windows: each worker puts its delta into a mailbox of its own; best on one machine.

    Args:
        centers: k, ranks 0 … k−1 hold a block of the center variable each; "hosts": one rank on each host.
        wire: of vectors on a GPU: "staged", "direct" with CUDA-aware MPI, or "auto".
        encoding: of commits: "float32", as they are; "bf16", "int8" or "int4", with error feedback.
        pull_encoding: of pulls, likewise, without.

    Raises:
        ValueError: for a number below 1, or an unknown encoding.
    """
    return resolve("rma", centers=centers, wire=wire, encoding=encoding, pull_encoding=pull_encoding)


def accumulate(centers: Centers = 1) -> Transport:
    """One-sided sums: workers add to the center variable themselves (TensorFlow's `use_locking=False`).

    No rank serves. Commits are neither whole, ordered, weighed nor refused by the center, and a pull may contain part
    of a commit: for rules whose commits are added as they are.

    Args:
        centers: k, ranks 0 … k−1 hold a block of the center variable each; "hosts": one rank on each host.

    Raises:
        ValueError: for a number below 1.
    """
    return resolve("accumulate", centers=centers)


def allreduce() -> Transport:
    """Every rank trains, and all exchange together: for the rules synchronous and diloco."""
    return resolve("allreduce")


def local(workers: int = 1) -> Transport:
    """All workers in this process, without MPI: for tests and comparison.

    Args:
        workers: n.

    Raises:
        ValueError: for a number below 1.
    """
    return resolve("local", workers=workers)


def refusals_of_going_on(rule: Rule, transport: Transport) -> list[tuple[bool, str]]:
    """What cannot be where workers do not wait: each with whether it is so here."""
    remedy = "leave wait on (no --no-wait)"
    return [
        (
            rule.allreduce,
            f"wait = False, but rule {rule.name} exchanges on all ranks at once: {remedy}",
        ),
        (
            rule.pulls == "before",
            f"wait = False, but rule {rule.name} pulls, and then commits what follows from it, which takes two "
            f"exchanges: {remedy}",
        ),
        (
            transport.node_centers,
            "wait = False with node_centers: not the workers wait for the network, but the node centers, which go on "
            f"meanwhile; {remedy}",
        ),
    ]


def refusals_of_encodings(rule: Rule, *encodings: str) -> list[tuple[bool, str]]:
    """What cannot be with encodings of commits or pulls: each with whether it is so here."""
    exact = all(get(name).exact for name in encodings)
    return [
        (
            bool(rule.buffers) and not exact,
            "buffers must arrive exactly: leave encoding and pull_encoding, or use layers without buffers (GroupNorm "
            "for BatchNorm)",
        ),
        (
            rule.pulls == "before" and not exact,
            f"rule {rule.name} takes from x what it adds to c, so both must be exact: leave encoding and pull_encoding",
        ),
    ]
