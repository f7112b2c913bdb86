"""The configuration of a run: one frozen dataclass, from a file with overrides, validated once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from ..core.ends import Capabilities
from ..core.optimizers import OPTIMIZERS, Optimizer
from ..core.rules import RULES, Rule, Weight, outer_rate, staleness_cap, staleness_power, weighted
from ..core.schedules import SCHEDULES, Schedule, constant, warmup
from ..reporting.writers import WRITERS
from ..transport import registry
from .options import Refusal, canonical, check, documented, known, overlay, read_toml, refuse
from .run_options import RunOptions

# Optimizers that the rules are known with, adam with all others.
_KNOWN_WITH = {"downpour": "sgd", "dynsgd": "sgd", "aeasgd": "sgd", "eamsgd": "nesterov", "diloco": "adamw"}
# The default rate grows with the number of workers, up to this one, and is reached after so many steps of each.
_GROWS_TO, _RISES = 8, 32
_MOVED_BY = ("add", "optimistic")  # these move the center as far as the commits say


@documented
@dataclass(frozen=True)
class Config(RunOptions):
    """The complete configuration of a run: its file repeats the run.

    `complete()` fills in defaults that depend on others. Options with aliases on the command line and in files, such as
    `learning_rate`, have one name here.

    Raises:
        ValueError: for an invalid value or combination, with the value and the remedy.
    """

    def __post_init__(self) -> None:
        check(self, _REFUSALS)
        if unknown := set(self.writer_names) - set(WRITERS):
            raise ValueError(f"writers are {', '.join(WRITERS)}, not {', '.join(sorted(unknown))}")
        if self.monitor is not None:
            self.monitored  # noqa: B018  # refused at once

    def complete(self, workers: int | None = None) -> "Config":
        """Return the configuration with each default that depends on others filled in, and checked.

        Args:
            workers: n, how many train (default: the option `workers`); the default rate depends on it.

        Raises:
            ValueError: for an invalid value or combination, with the value and the remedy.
        """
        optimizer = self.optimizer or _KNOWN_WITH.get(self.rule, "adam")
        rate = self.rate or (0.001 if optimizer.startswith("adam") else 0.01)
        overlap = self.overlap or not self.wait
        complete = replace(self, optimizer=optimizer, rate=rate, overlap=overlap)
        complete = complete._with_center_optimizer(workers or self.workers)
        complete = replace(complete, transport=complete.make_transport().name)._with_outer_rate()
        complete = complete._with_rate_of(workers or self.workers, given=self.rate)
        refuse(complete, (*_REFUSALS_OF_COMPLETE, *_TRANSPORT_RULES))
        complete.make_rule(), complete.make_optimizer(1000), complete.make_center_optimizer(1000)
        return complete

    def _with_center_optimizer(self, workers: int) -> "Config":
        """The configuration with defaults of the center's optimizer and its numbers."""
        center, rate, options = self.center_optimizer, self.center_rate, self.center_options
        if center is None and self.rule == "diloco":
            center, rate, options = "nesterov", rate or 0.7, {"beta": 0.9} | options
        elif center is None and self.variant == "gradient":
            center, options = self.optimizer, self.optimizer_options | options
        elif center == "optimistic":
            options = {"span": max(workers, 2)} | options
        center = center or "add"
        if center != "add":
            rate = rate or (1.0 if center == "optimistic" and self.variant == "displacement" else self.rate)
        return replace(self, center_optimizer=center, center_rate=rate, center_options=options)

    def _with_outer_rate(self) -> "Config":
        """The configuration with the default of the outer rate: 1, but where nobody can weigh single displacements."""
        if self.rule != "agn" or self.outer_rate is not None:
            return self
        plain = self.variant == "displacement" and self.center_optimizer in _MOVED_BY
        return replace(self, outer_rate=1.0 if plain and self._capabilities.single_commits else "published")

    def _with_rate_of(self, workers: int, given: float | None) -> "Config":
        """The configuration with the default rate and warmup, where a round of n commits moves the center as one would.

        n workers that are averaged take an nth of the steps, and average out n times the noise: so ηn, not η.
        """
        assert self.rate is not None
        assert self.optimizer is not None
        averages = self.outer_rate == 1 and self.center_optimizer in _MOVED_BY and workers > 1
        if given is not None or not averages or not self.optimizer.startswith("adam"):
            return replace(self, warmup=self.warmup or 0)
        rises = _RISES * workers if self.warmup is None else self.warmup
        return replace(self, rate=self.rate * min(workers, _GROWS_TO), warmup=rises)

    @property
    def writer_names(self) -> tuple[str, ...]:
        """The names in `writers`."""
        return tuple(name.strip() for name in self.writers.split(",") if name.strip())

    @property
    def monitored(self) -> tuple[str, int]:
        """The metric of `monitor`, and its sign: 1 if the largest is the best, -1 if the smallest.

        Raises:
            ValueError: where neither the option nor the name says which.
        """
        name, _, best = (self.monitor or "").partition(":")
        known = {"max": 1, "min": -1}
        guessed = {"loss": "min", "error": "min", "acc": "max"}
        best = best or next((sign for part, sign in guessed.items() if part in name), "")
        if not name or best not in known:
            name = name or "NAME"
            raise ValueError(f"monitor {self.monitor!r}: say which is best, {name}:max or {name}:min")
        return name, known[best]

    def make_transport(self) -> registry.Transport:
        """The transport, with its options."""
        names = ["centers", "node_centers", "message_buffers", "wire", "center_device", "encoding", "pull_encoding"]
        names += ["spares"]
        options = {name: getattr(self, name) for name in names}
        return registry.resolve(self.transport, self.make_rule().allreduce, workers=self.workers, **options)

    @property
    def _capabilities(self) -> Capabilities:
        return self.make_transport().capabilities

    def make_rule(self) -> Rule:
        """The rule, with its numbers; of a complete configuration."""
        assert self.rate is not None
        alpha = self.rate * self.rho
        numbers: dict[str, list[Any]] = {"agn": [self.variant], "aeasgd": [alpha], "eamsgd": [alpha]}
        return weighted(RULES[self.rule](*numbers.get(self.rule, [])), *self._weights())

    def _weights(self) -> list[Weight]:
        weights = list[Weight]()
        weights += [outer_rate(float(self.outer_rate))] if self.outer_rate not in (None, "published") else []
        weights += [staleness_power(self.staleness_power)] if self.staleness_power else []
        return weights + ([] if self.staleness_cap is None else [staleness_cap(self.staleness_cap)])

    def make_schedule(self, steps: int) -> Schedule:
        """The rate as a function of the step, in a run of `steps` steps."""
        assert self.rate is not None
        schedule = SCHEDULES[self.schedule](self.rate, steps, self.decay_every, self.decay_factor)
        return warmup(schedule, self.warmup) if self.warmup else schedule

    def make_optimizer(self, steps: int) -> Optimizer:
        """The workers' optimizer, in a run of `steps` steps."""
        assert self.optimizer is not None
        return self._make(self.optimizer, self.make_schedule(steps), self.optimizer_options)

    @property
    def adds(self) -> bool:
        """Whether the center adds commits; else an optimizer steps it."""
        return self.center_optimizer in (None, "add")

    def make_center_optimizer(self, steps: int) -> Optimizer | None:
        """The center's optimizer, None to add; with variant "gradient" its rate follows the schedule."""
        if self.center_optimizer is None or self.adds:
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
            takes = ", ".join(list(signature(OPTIMIZERS[name]).parameters)[1:])
            raise ValueError(f"optimizer {name}: {error}; its options are {takes}") from error

    def to_toml(self) -> str:
        """The configuration as a file that `load` reads."""
        import tomli_w

        return tomli_w.dumps({key: value for key, value in asdict(self).items() if value is not None})


# For any configuration.
_REFUSALS: tuple[Refusal[Config], ...] = (
    (lambda c: c.outer_rate is not None and c.rule != "agn", "outer_rate is of rule agn, not of {rule}"),
    (lambda c: c.variant != "displacement" and c.rule != "agn", "variant {variant!r} is of rule agn, not of {rule}"),
    (
        lambda c: c.rho != Config.rho and c.rule not in ("aeasgd", "eamsgd"),
        "rho is of rules aeasgd and eamsgd, not of {rule}",
    ),
    (
        lambda c: c.staleness_cap is not None and c.centers != 1,
        "staleness_cap with centers = {centers}: each has a clock of its own, and would drop alone; leave one of them",
    ),
    (
        lambda c: c.schedule == "step" and not c.decay_every > 0,
        "schedule 'step' needs decay_every > 0, not {decay_every!r}",
    ),
    (
        lambda c: (c.decay_every, c.decay_factor) != (Config.decay_every, Config.decay_factor) and c.schedule != "step",
        "decay_every and decay_factor are of schedule 'step', not of {schedule!r}",
    ),
    (
        lambda c: c.record and c.spares > 0,
        "record with spares = {spares}: who computed what could not be replayed; leave one of them",
    ),
    (
        lambda c: c.joinable and c.record,
        "joinable with record: a record is replayed with the workers of the beginning; leave one of them",
    ),
    (
        lambda c: c.joinable and c.spares > 0,
        "joinable with spares = {spares}: no MPI has both, MPICH lets ranks join, Open MPI calls spares; leave one",
    ),
    (
        lambda c: c.drop_stalled and not c.stall_limit,
        "drop_stalled drops workers that are silent for longer than stall_limit: give that, too",
    ),
    (
        lambda c: c.monitor is None and (c.patience is not None or c.stop_at is not None),
        "patience and stop_at are of a metric: name it with monitor",
    ),
    (
        lambda c: c.record and (c.overlap or not c.wait),
        "record with overlap cannot be replayed: the center does not know after which step a worker took up its "
        "pull; leave one of them",
    ),
    (
        lambda c: c.record and c.drop_stalled,
        "record with drop_stalled cannot be replayed: a record does not say when it dropped whom; leave one of them",
    ),
    (
        lambda c: c.record and c.resume is not None,
        "a record begins with the run: leave out record (--no-record), or resume {resume!r}",
    ),
    (
        lambda c: c.resume == "auto" and c.run_dir is None,
        "resume 'auto' looks for checkpoints in the run's directory: name it with run_dir",
    ),
    (
        lambda c: c.resume not in (None, "auto") and c.run_dir is not None and Path(c.run_dir) != Path(c.resume),
        "resume goes on in {resume}: leave out run_dir {run_dir}",
    ),
)

# For a complete one.
_REFUSALS_OF_COMPLETE: tuple[Refusal[Config], ...] = (
    (
        lambda c: c.variant == "gradient" and c.center_optimizer == "add",
        "variant 'gradient' commits gradients: it needs a center optimizer, not 'add'",
    ),
    (
        lambda c: c.center_optimizer == "add" and (c.center_rate is not None or bool(c.center_options)),
        "center_rate and center_options need a center_optimizer other than 'add'",
    ),
)

# For its transport, which is no longer "auto".
_TRANSPORT_RULES: tuple[Refusal[Config], ...] = (
    (
        lambda c: c.workers != 1 and (c._capabilities.center_ranks or c._capabilities.together),
        "workers = {workers} is for --transport local; else the ranks are counted: give --workers 1",
    ),
    (
        lambda c: c.drop_stalled and (not c._capabilities.silent_workers or c.centers != 1),
        "drop_stalled needs transport p2p and one center, not {transport!r}, {centers}",
    ),
    (
        lambda c: c.joinable and (not c._capabilities.silent_workers or c.centers != 1 or c.node_centers),
        "joinable needs transport p2p, one center and no node_centers, not {transport!r}, {centers}",
    ),
    (
        lambda c: bool(c.stall_limit) and not c._capabilities.single_commits,
        "stall_limit with transport {transport}: the center hears of no single worker; leave one of them",
    ),
    (
        lambda c: c.record and (c.centers != 1 or not c._capabilities.single_commits),
        "record is of one center that serves: with several each has an order of its own",
    ),
    (
        lambda c: c.node_centers and c.drop_stalled,
        "drop_stalled with node_centers: a host's steps are held by its node center; leave one of them",
    ),
    (
        lambda c: c.node_centers and c.record,
        "record is of one center that serves: node centers have an order of their own; leave one of them",
    ),
    (
        lambda c: c.record and c._capabilities.together,
        "record is of runs with a center; on transport {transport} every run repeats itself",
    ),
    (
        lambda c: c.record and not c._capabilities.message_order,
        "record is of transport p2p: what {transport} does is not in the order of messages",
    ),
)


def load(path: str | None = None, given: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: TOML file, if any; its table [simulation] is not read.
        given: values that override it; `epochs` among them override `steps` in the file.
        sets: `KEY=VALUE` each, override both. A VALUE is read as TOML if it is any (3, 0.1, true, [1, 2]), else as a
            string; KEY may name a value in a table (options.hidden).

    Returns:
        The configuration; aliases of options and of values are replaced by those of Config.

    Raises:
        ValueError: for an unknown option or a bad value.
        OSError: if there is no such file.
    """
    written = {} if path is None else read_toml(path)
    if "dtypes" in written:  # by a LoopMonitor
        raise ValueError(
            f"{path!r}: this is the run of a loop of its own, in {written['problem']!r}: start that script again "
            "(with resume), or load best.safetensors there"
        )
    values = _layer(written)
    values.pop("simulation", None)  # of `simulate`, which reads it itself
    overrides = _layer(given or {})
    values |= overrides
    named = {*overrides, *overlay(Config, values, sets)}
    if "epochs" in named and "steps" not in named:
        values.pop("steps", None)  # the file's
    return Config(**known(Config, _locking(values, values.get("transport", "auto"))))


def newest_config(directory: Path) -> Path:
    """The file with the configuration that the run in `directory` had last: config.toml, or config-N.toml."""
    later = [path for path in directory.glob("config-*.toml") if path.stem[7:].isdigit()]
    return max(later, key=lambda path: int(path.stem[7:]), default=directory / "config.toml")


def load_run(directory: Path, given: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Config:
    """Read the configuration that the run in `directory` had last; arguments and errors as of `load`."""
    path = newest_config(directory)
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds no run: there is no config.toml")
    config = load(str(path), given, sets)
    if config.rule == "agn" and config.outer_rate is None:
        return replace(config, outer_rate="published")  # of agnmpi 0.4, where nothing else was the default
    return config


def _layer(values: Mapping[str, Any]) -> dict[str, Any]:
    result = canonical(Config, values)
    return _locking(result, result["transport"]) if "transport" in result else result


def _locking(values: dict[str, Any], transport: str) -> dict[str, Any]:
    """Replace TensorFlow's `use_locking` by the corresponding transport."""
    locking = values.pop("use_locking", None)
    if locking not in (None, True, False):
        raise ValueError(f"use_locking must be of type bool, not {locking!r}")
    return values if locking is None else values | {"transport": registry.locked(transport, locking)}
