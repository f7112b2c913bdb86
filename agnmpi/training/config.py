"""The configuration of a run: one frozen dataclass, from a file with overrides, validated once."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..core.optimizers import OPTIMIZERS, Optimizer
from ..core.rules import RULES, Rule, Weight, outer_rate, staleness_cap, staleness_power, weighted
from ..core.schedules import SCHEDULES, Schedule, constant, cosine, step_decay, warmup
from ..transport.registry import Transport, names, resolve
from .options import at_least, check_type, option


@dataclass(frozen=True)
class Config:
    """A run, whole: its file repeats it. Raises ValueError for what cannot be, with the value and the remedy."""

    problem: str = option("", "problem", "MODULE:PROBLEM, a module's name or a .py file and a class in it")
    options: dict[str, Any] = option({}, "problem", "what the problem is made with (--set options.KEY=VALUE)")

    rule: str = option("agn", "rule", "how workers and center exchange", choices=list(RULES))
    variant: str = option("displacement", "rule", "of agn", choices=("displacement", "gradient"))
    period: int = option(10, "rule", "communication period λ: local steps between exchanges", int)
    rho: float = option(5.0, "rule", "ρ of the elastic rules; α = rate·ρ", float)
    outer_rate: float | None = option(
        None,
        "rule",
        "r of agn: commits count rλ/n, so that a round of n moves the center by r mean displacements",
        float,
    )
    staleness_power: float = option(
        0.0, "rule", "a: a commit of staleness s counts min(1, (n/(1 + s))^a); 0: whole", float
    )
    staleness_cap: int | None = option(None, "rule", "commits of a greater staleness are dropped", int)
    dylu: bool = option(False, "rule", "λ is of the fastest worker; the others' are in proportion to speed", bool)
    overlap: bool = option(False, "rule", "compute the next period while an exchange is under way", bool)
    transport: str = option(
        "auto",
        "rule",
        "how messages travel; auto: collective or p2p, as the rule needs; rma: one-sided windows; local: all workers "
        "in one process",
        choices=names(),
    )
    use_locking: bool = option(
        True, "rule", "whole commits; --no-use-locking sums them into the center without a server (rma)", bool
    )
    centers: int = option(1, "rule", "ranks 0 … k−1 hold a block of the center each", int)
    wire: str = option(
        "auto",
        "rule",
        "of vectors on a GPU: staged through pinned host memory, direct with CUDA-aware MPI; auto: as doctor found out",
        choices=("auto", "staged", "direct"),
    )
    workers: int = option(1, "rule", "number of workers, for --transport local only", int)
    slots: int = option(4, "rule", "vectors at a p2p center for messages on their way", int)

    optimizer: str | None = option(
        None, "optimizer", "of the workers [default: what the rule is known with]", choices=list(OPTIMIZERS)
    )
    rate: float | None = option(
        None, "optimizer", "learning rate η [default: 0.001 for adam and adamw, else 0.01]", float
    )
    optimizer_options: dict[str, Any] = option({}, "optimizer", "such as beta, beta1, epsilon")
    weight_decay: float | None = option(None, "optimizer", "w [default: the optimizer's]", float)
    clip: float = option(0.0, "optimizer", "largest global norm of a gradient; 0: none", float)
    schedule: str = option("constant", "optimizer", "of the rate over the run's steps", choices=SCHEDULES)
    decay_every: int = option(0, "optimizer", "steps between decays, for --schedule step", int)
    decay_factor: float = option(0.1, "optimizer", "factor of a decay, for --schedule step", float)
    warmup: int = option(0, "optimizer", "steps over which the rate rises at the start", int)
    center_optimizer: str | None = option(
        None,
        "optimizer",
        "at the center [default: add, or what the rule is known with]",
        choices=["add", *OPTIMIZERS],
    )
    center_rate: float | None = option(None, "optimizer", "its learning rate", float)
    center_options: dict[str, Any] = option({}, "optimizer", "its further numbers, such as beta")

    batch: int = option(32, "run", "samples in a step", int)
    epochs: float = option(1.0, "run", "passes over the training data, all workers together", float)
    steps: int | None = option(None, "run", "steps of all workers together, instead of --epochs", int)
    seed: int = option(0, "run", "of the initial parameters and of the order of samples", int)
    device: str = option("auto", "run", "where workers compute", choices=("auto", "cpu", "gpu"))
    center_device: str = option("cpu", "run", "where the center lies", choices=("cpu", "gpu"))
    evaluate_every: float = option(1.0, "run", "epochs between evaluations; 0: only at the end", float)
    log_every: float = option(1.0, "run", "seconds between lines in events.jsonl", float)
    record: bool = option(False, "run", "write the order of messages at the center, for simulate --replay", bool)
    checkpoint_seconds: float = option(300.0, "run", "seconds between checkpoints; 0: by commits alone", float)
    checkpoint_commits: int = option(0, "run", "commits between checkpoints; 0: by seconds alone", int)
    keep: int = option(3, "run", "number of checkpoints that stay; 0: write none, not even at the end", int)
    stall_limit: float = option(0.0, "run", "report a worker that is silent for so many seconds; 0: never", float)
    drop_stalled: bool = option(
        False, "run", "wait no longer for such a worker: its steps go to others (p2p, one center; see README)", bool
    )
    resume: str | None = option(
        None, "run", "go on from the newest checkpoint of this run's directory; auto: of --run, if there is one"
    )
    run: str | None = option(None, "run", "directory for what the run writes [default: runs/PROBLEM-DATE]")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), f.metadata)
        for name in ("period", "workers", "centers", "slots", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in (
            "clip",
            "warmup",
            "evaluate_every",
            "seed",
            "checkpoint_seconds",
            "checkpoint_commits",
            "keep",
            "stall_limit",
            "staleness_power",
        ):
            at_least(name, getattr(self, name), 0)
        if self.staleness_cap is not None:
            at_least("staleness_cap", self.staleness_cap, 0)
            if self.centers > 1:
                raise ValueError(
                    "staleness_cap with several centers: each has a clock of its own, and would drop alone"
                )
        if self.outer_rate is not None and self.rule != "agn":
            raise ValueError(f"outer_rate is of rule agn, not of {self.rule}")
        if self.steps is not None:
            at_least("steps", self.steps, 1)
        for name in ("rate", "center_rate", "outer_rate", "rho", "epochs", "log_every", "decay_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        if self.schedule == "step" and not self.decay_every > 0:
            raise ValueError(f"schedule 'step' needs decay_every > 0, not {self.decay_every!r}")
        if self.workers != 1 and self.transport != "local":
            raise ValueError(f"workers = {self.workers} is for --transport local; else the ranks are counted")
        if self.record and self.overlap:
            raise ValueError(
                "record with overlap cannot be replayed: the center does not know after which step a worker took up "
                "its pull; leave one of them"
            )
        if self.drop_stalled and not self.stall_limit:
            raise ValueError("drop_stalled drops workers that are silent for longer than stall_limit: give that, too")
        if self.resume == "auto" and self.run is None:
            raise ValueError("resume 'auto' looks for checkpoints in the run's directory: name it with run")
        if self.record and self.drop_stalled:
            raise ValueError("record with drop_stalled cannot be replayed: a record does not say when it dropped whom")
        if self.run is not None and self.resume not in (None, "auto") and Path(self.run) != Path(self.resume):
            raise ValueError(f"resume goes on in {self.resume}: leave out run {self.run}")
        if self.resume is not None and self.record:
            raise ValueError("a record begins with the run: leave out record, or resume")
        if self.variant != "displacement" and self.rule != "agn":
            raise ValueError(f"variant {self.variant!r} is of rule agn, not of {self.rule}")

    def complete(self) -> "Config":
        """Return the configuration with each default that depends on others filled in, and tried out."""
        elastic_or_raw = self.rule in ("downpour", "dynsgd", "aeasgd")
        known = {"eamsgd": "nesterov", "diloco": "adamw"}.get(self.rule, "sgd" if elastic_or_raw else "adam")
        optimizer = self.optimizer or known
        rate = self.rate or (0.001 if optimizer.startswith("adam") else 0.01)
        center, center_rate, center_options = self.center_optimizer, self.center_rate, self.center_options
        if center is None and self.rule == "diloco":
            center, center_rate = "nesterov", center_rate or 0.7
            center_options = {"beta": 0.9} | center_options
        elif center is None and self.variant == "gradient":
            center, center_rate = optimizer, center_rate or rate
            center_options = self.optimizer_options | center_options
        center = center or "add"
        if center == "add" and self.variant == "gradient":
            raise ValueError("variant 'gradient' commits gradients: it needs a center optimizer, not 'add'")
        if center == "add" and (center_rate is not None or center_options):
            raise ValueError("center_rate and center_options need a center_optimizer other than 'add'")
        if center != "add":
            center_rate = center_rate or rate
        transport = self.make_transport(rate).name
        if self.record and (self.centers > 1 or not self.use_locking):
            raise ValueError("record is of one center that serves: with several each has an order of its own")
        if self.drop_stalled and (transport != "p2p" or self.centers > 1):
            raise ValueError(f"drop_stalled needs transport p2p and one center, not {transport!r}, {self.centers}")
        if self.record and transport == "rma":
            raise ValueError("record is of transport p2p: what one-sided calls read is not in the order of messages")
        if self.stall_limit and not self.use_locking:
            raise ValueError("stall_limit without locking: the center hears of no single worker; leave one of them")
        if self.record and transport == "allreduce":
            raise ValueError("record is of runs with a center; on transport allreduce every run repeats itself")
        whole = replace(
            self,
            optimizer=optimizer,
            rate=rate,
            center_optimizer=center,
            center_rate=center_rate,
            center_options=center_options,
            transport=transport,
        )
        whole.make_rule(rate), whole.make_optimizer(1000), whole.make_center_optimizer(1000)
        return whole

    def make_transport(self, rate: float | None = None) -> Transport:
        """How commits travel, with its numbers."""
        options: dict[str, int | str] = {"centers": self.centers, "wire": self.wire, "workers": self.workers}
        options |= {"message_buffers": self.slots, "center_device": self.center_device}
        return resolve(self.transport, self.make_rule(rate).allreduce, self.use_locking, **options)

    def make_rule(self, rate: float | None = None) -> Rule:
        """The rule, with its numbers."""
        return weighted(self._make_rule(rate or self.rate), *self._weights())

    def _weights(self) -> list[Weight]:
        weights = []
        if self.outer_rate is not None:
            weights.append(outer_rate(self.outer_rate))
        if self.staleness_power:
            weights.append(staleness_power(self.staleness_power))
        if self.staleness_cap is not None:
            weights.append(staleness_cap(self.staleness_cap))
        return weights

    def _make_rule(self, rate: float | None) -> Rule:
        if self.rule in ("aeasgd", "eamsgd"):
            assert rate is not None
            return RULES[self.rule](rate * self.rho)
        return RULES[self.rule](self.variant) if self.rule == "agn" else RULES[self.rule]()

    def make_schedule(self, steps: int) -> Schedule:
        """The rate as a function of the step, in a run of `steps` steps."""
        assert self.rate is not None
        schedule = {
            "constant": lambda rate: constant(rate),
            "step": lambda rate: step_decay(rate, self.decay_every, self.decay_factor),
            "cosine": lambda rate: cosine(rate, steps),
        }[self.schedule](self.rate)
        return warmup(schedule, self.warmup) if self.warmup else schedule

    def make_optimizer(self, steps: int) -> Optimizer:
        """The workers' optimizer, in a run of `steps` steps."""
        assert self.optimizer is not None
        return self._make(self.optimizer, self.make_schedule(steps), self.optimizer_options)

    def make_center_optimizer(self, steps: int) -> Optimizer | None:
        """The center's optimizer, None to add; with variant "gradient" its rate follows the schedule."""
        if self.center_optimizer in (None, "add"):
            return None
        assert self.center_rate is not None
        if self.variant == "gradient":
            schedule = replace(self, rate=self.center_rate).make_schedule(steps)
            return self._make(self.center_optimizer, schedule, self.center_options)
        return self._build(self.center_optimizer, constant(self.center_rate), self.center_options)

    def _make(self, name: str, rate: Schedule, options: Mapping[str, Any]) -> Optimizer:
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return self._build(name, rate, {**options, **decay, "clip": self.clip})

    @staticmethod
    def _build(name: str, rate: Schedule, options: Mapping[str, Any]) -> Optimizer:
        try:
            return OPTIMIZERS[name](rate, **options)
        except TypeError as error:
            raise ValueError(f"optimizer {name}: {error}") from error

    def to_toml(self) -> str:
        """The configuration as a file that `load` reads."""
        import tomli_w

        return tomli_w.dumps({key: value for key, value in asdict(self).items() if value is not None})


def load(path: str | None = None, given: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Config:
    """Read a TOML file, lay the values `given` over it, then each `KEY=VALUE` of `sets`.

    A VALUE is read as TOML if it is any (3, 0.1, true, [1, 2]), else as a string; KEY may name a value in a table
    (options.hidden). Epochs that are given override steps in the file. Raises ValueError for an unknown key or a bad
    value, OSError for a missing file.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
        values.pop("simulation", None)  # of `simulate`, which reads it itself
    values |= given or {}
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r}: give KEY=VALUE")
        table, dot, name = key.partition(".")
        if dot:
            inner = values.get(table, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {item!r}: {table} is no table")
            values[table] = inner | {name: _value(text)}
        else:
            values[key] = _value(text)
    asked = {*(given or {}), *(item.partition("=")[0] for item in sets)}
    if "epochs" in asked and "steps" not in asked:
        values.pop("steps", None)  # the file's
    known = [f.name for f in fields(Config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return Config(**values)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
