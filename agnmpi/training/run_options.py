"""All options of a run, each declared once: its name, default, help and choices."""

from dataclasses import dataclass
from typing import Any

from ..arrays.encodings import NAMES
from ..core.optimizers import OPTIMIZERS
from ..core.rules import RULES
from ..core.schedules import SCHEDULES
from ..reporting.writers import WRITERS
from ..transport import registry
from .options import option


@dataclass(frozen=True)
class RunOptions:
    """The fields of `Config`."""

    problem: str = option(
        "", "problem", "a module's name or a .py file, and a class in it, such as examples/digits.py:Digits"
    )
    options: dict[str, Any] = option({}, "problem", "what the problem is made with (--set options.KEY=VALUE)")

    rule: str = option("agn", "rule", "how workers and center exchange", choices=list(RULES))
    variant: str = option(
        "displacement", "rule", "what workers commit with rule agn", choices=("displacement", "gradient")
    )
    period: int = option(
        10,
        "rule",
        "communication period λ: local steps between exchanges",
        int,
        least=1,
        also=("communication_period",),
    )
    overlap: bool = option(False, "rule", "compute the next period while an exchange is under way", bool)
    wait: bool = option(
        True,
        "rule",
        "after λ steps wait for an exchange under way; or (--no-wait) overlap, and take up to 7 λ steps meanwhile",
        bool,
    )
    dylu: bool = option(
        False,
        "rule",
        "dynamic local updates: λ is of the fastest worker, the others' are in proportion to their speeds",
        bool,
    )
    rho: float = option(5.0, "rule", "ρ of aeasgd and eamsgd; α = rate·ρ", float, positive=True)
    outer_rate: float | str | None = option(
        None,
        "rule",
        "r of agn: commits count rλ/n, so that a round of n moves the center by r mean displacements; published: they "
        "count as they are, r = n/λ [default: 1 where the center adds displacements one by one, else published]",
        float,
        positive=True,
        words=("published",),
    )
    staleness_power: float = option(
        0.0, "rule", "a: a commit of staleness s counts min(1, (n/(1 + s))^a); 0: whole", float, least=0
    )
    staleness_cap: int | None = option(None, "rule", "commits of a greater staleness are dropped", int, least=0)

    transport: str = option(
        "auto",
        "transport",
        "how commits travel; auto: allreduce or p2p, as the rule needs; "
        + "; ".join(f"{entry.name}: {entry.about}" for entry in registry.entries())
        + "; rma with --no-use-locking is accumulate",
        choices=registry.names(),
        aliases=registry.ALIASES,
    )
    centers: registry.Centers = option(
        1, "transport", "center ranks 0 … k−1, a block each; hosts: one on each host", int, least=1, words=("hosts",)
    )
    node_centers: bool = option(
        False,
        "transport",
        "on each host of three ranks or more, beside rank 0's, one rank sums the commits of the others",
        bool,
    )
    workers: int = option(
        1,
        "transport",
        "number of workers in one process (of train: with --transport local)",
        int,
        least=1,
        most=100_000,
    )
    spares: int = option(
        0, "transport", "the last k ranks wait, and take the places of lost ones (ULFM; p2p, one center)", int, least=0
    )
    joinable: bool = option(
        False, "transport", "ranks of another mpiexec may come in: agnmpi join RUN (MPICH; p2p, one center)", bool
    )
    message_buffers: int = option(
        4, "transport", "vectors at a p2p center for messages on their way", int, least=1, also=("slots",)
    )
    encoding: str = option("float32", "transport", "of commits on the wire, with error feedback", choices=NAMES)
    pull_encoding: str = option("float32", "transport", "of pulls; the last of a run is float32", choices=NAMES)
    wire: str = option(
        "auto",
        "transport",
        "how vectors on a GPU travel: staged through pinned host memory; direct, with CUDA-aware MPI; auto: as doctor "
        "found out",
        choices=("auto", "staged", "direct"),
    )

    optimizer: str | None = option(
        None, "optimizer", "the workers' [default: what the rule is known with]", choices=list(OPTIMIZERS)
    )
    rate: float | None = option(
        None,
        "optimizer",
        "learning rate η [default: 0.001 for adam and adamw, with rule agn and an outer rate of 1 times min(n, 8); "
        "else 0.01]",
        float,
        positive=True,
        also=("learning_rate", "lr"),
    )
    optimizer_options: dict[str, Any] = option(
        {}, "optimizer", "further numbers of the workers' optimizer, such as beta1, epsilon"
    )
    weight_decay: float | None = option(None, "optimizer", "weight decay w [default: the optimizer's]", float)
    clip: float = option(0.0, "optimizer", "largest global norm of a gradient; 0: none", float, least=0)
    schedule: str = option("constant", "optimizer", "how the rate goes over the run's steps", choices=list(SCHEDULES))
    decay_every: int = option(0, "optimizer", "steps between decays, for --schedule step", int)
    decay_factor: float = option(0.1, "optimizer", "factor of a decay, for --schedule step", float, positive=True)
    warmup: int | None = option(
        None,
        "optimizer",
        "steps over which the rate rises at the start [default: 32n where the default rate is times n, else 0]",
        int,
        least=0,
    )
    center_optimizer: str | None = option(
        None, "optimizer", "the center's [default: add, or what the rule is known with]", choices=["add", *OPTIMIZERS]
    )
    center_rate: float | None = option(
        None,
        "optimizer",
        "learning rate of the center's optimizer [default: the workers'; 1 of optimistic]",
        float,
        positive=True,
    )
    center_options: dict[str, Any] = option({}, "optimizer", "further numbers of the center's optimizer, such as beta")

    batch: int = option(32, "run", "samples in a step of one worker", int, least=1, also=("batch_size",))
    epochs: float | None = option(
        None,
        "run",
        "passes over the training data, all workers together [default: what the problem names, else 1]",
        float,
        positive=True,
    )
    steps: int | None = option(None, "run", "steps of all workers together, instead of --epochs", int, least=1)
    seed: int = option(0, "run", "of the initial parameters and of the order of samples", int, least=0)
    device: str = option("auto", "run", "where workers compute", choices=("auto", "cpu", "gpu"))
    center_device: str = option("cpu", "run", "where the center lies", choices=("cpu", "gpu"))

    run_dir: str | None = option(
        None, "output", "directory for what the run writes [default: runs/PROBLEM-DATE]", also=("run",)
    )
    evaluate_every: float = option(1.0, "output", "epochs between evaluations; 0: only at the end", float, least=0)
    monitor: str | None = option(
        None,
        "output",
        "keep the center with the best value of this metric: NAME:max or NAME:min; without it names with loss or error "
        "are min, with acc max",
    )
    patience: int | None = option(
        None, "output", "evaluations without a better value of --monitor, after which the run ends", int, least=1
    )
    stop_at: float | None = option(None, "output", "value of --monitor at which the run ends", float)
    writers: str = option(
        "",
        "output",
        f"where the numbers of events.jsonl go, too, by commas: {', '.join(WRITERS)}",
    )
    log_every: float = option(1.0, "output", "seconds between lines in events.jsonl", float, positive=True)
    record: bool = option(False, "output", "write the order of messages at the center, for simulate --replay", bool)

    checkpoint_seconds: float = option(
        300.0, "checkpoint", "seconds between checkpoints; 0: by commits alone", float, least=0
    )
    checkpoint_commits: int = option(0, "checkpoint", "commits between checkpoints; 0: by seconds alone", int, least=0)
    checkpoint_workers: str = option(
        "auto",
        "checkpoint",
        "which checkpoints hold the workers' local parameters and optimizer states beside the center: all; end, the "
        "last one alone; none; auto: all, or end where they are large. Without them workers resume from the center",
        choices=("auto", "all", "end", "none"),
    )
    keep_checkpoints: int = option(
        3,
        "checkpoint",
        "number of checkpoints that stay; 0: write none, not even at the end",
        int,
        least=0,
        also=("keep",),
    )
    resume: str | None = option(
        None,
        "checkpoint",
        "go on from the newest checkpoint of the run in this directory; auto: of that in --run-dir, if any",
    )
    stall_limit: float = option(
        0.0, "checkpoint", "report a worker that is silent for so many seconds; 0: never", float, least=0
    )
    drop_stalled: bool = option(
        False, "checkpoint", "wait no longer for such a worker: its steps go to others (p2p, one center)", bool
    )
