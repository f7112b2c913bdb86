"""A run on disk: its directory, configuration and result."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.backend import device_count
from ..cluster.machine import unused_devices
from ..cluster.role import Role
from ..core.batches import Plan
from ..core.params import Layout
from ..recovery.files import save, write_atomic
from ..recovery.lock import lock
from ..reporting.advice import advice
from ..reporting.runs import digits, duration
from ..version import __version__, mpi_library
from .config import Config, load_run, newest_config
from .exits import DEGRADED, UNEVALUATED
from .monitor import Monitor, format_metrics
from .problem import absolute

if TYPE_CHECKING:  # it needs MPI, which a simulation does without
    from ..cluster.setup import Setup


def run_directory(config: Config) -> Path:
    """Create the run's directory, and lock it.

    Raises FileExistsError rather than overwrite another run, or work where another job does.
    """
    if config.resume is not None:
        path = Path((config.run_dir or "") if config.resume == "auto" else config.resume)
        path.mkdir(parents=True, exist_ok=True)
        lock(path)
        return path
    if not config.run_dir:
        path = new_directory(f"{config.problem.rpartition(':')[2].lower()}-{time.strftime('%Y%m%d-%H%M%S')}")
        lock(path)
        return path
    path = Path(config.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    lock(path)  # another job may be about to write its configuration
    if (path / "config.toml").exists():
        raise FileExistsError(f"{path} holds another run; give another directory (--run-dir), or remove it")
    return path


def new_directory(name: str) -> Path:
    """Create a new directory in runs/, even beside runs that began in the same second."""
    path, number = Path("runs") / name, 1
    path.parent.mkdir(exist_ok=True)
    while True:
        with suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1
        path = path.with_name(f"{name}-{number}")


def repeatable(config: Config) -> Config:
    """The configuration without the options that differ when it is repeated."""
    return replace(config, problem=absolute(config.problem), run_dir=None, resume=None)


def write_config(directory: Path, config: Config) -> dict[str, list[Any]]:
    """Write the configuration of a run; one that it was resumed with beside the first, which stays.

    Returns the options that differ from the last time, before and now.
    """
    path = newest_config(directory)
    if not path.is_file():
        write_atomic(path, repeatable(config).to_toml().encode())
        return {}
    changed = changed_options(directory, config)
    if changed:
        number = int(path.stem[7:] or 1) + 1
        write_atomic(directory / f"config-{number}.toml", repeatable(config).to_toml().encode())
    return changed


def changed_options(directory: Path, config: Config) -> dict[str, list[Any]]:
    """The options in which a configuration differs from what the run in `directory` had last, before and now."""
    before, now = (asdict(repeatable(c)) for c in (load_run(directory), config))
    return {name: [before[name], value] for name, value in now.items() if before[name] != value}


def save_center(directory: Path, rule: str, layout: Layout, role: Role) -> None:
    """Write center.safetensors: the center variable by name."""
    meta = {"agnmpi": __version__, "clock": str(role.center.clock), "rule": rule}
    save(directory / "center.safetensors", layout.views(role.c), meta)


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write result.json."""
    write_atomic(directory / "result.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def conclude(
    directory: Path,
    options: Mapping[str, Any],
    layout: Layout,
    role: Role,
    monitor: Monitor,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the final center, evaluate it, and write the result, with `extra` fields; returns it.

    Raises OSError where it cannot be written; a center that cannot leaves no result, which would be one of another.
    """
    try:
        save_center(directory, options["rule"], layout, role)
    except OSError:
        monitor.stop("failed", ranks=[0])
        raise
    result = {
        **{name: options[name] for name in ("problem", "rule", "variant", "transport", "period")},
        "workers": role.count,
        **monitor.finish(role.c),
        **extra,
        "agnmpi": __version__,
        "run_dir": str(directory),
        "options": dict(options),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    write_result(directory, result)
    return result


def about_ranks(role: Role, lost: Sequence[int], hosts: Sequence[str]) -> dict[str, Any]:
    """Fields of a result: refused commits, the ranks that died, the MPI library, and the ranks on each of `hosts`."""
    ranks = {host: hosts.count(host) for host in hosts}
    return {"refused": role.center.refused, "lost": list(lost), "mpi": mpi_library(), "hosts": ranks}


def finish_run(
    directory: Path,
    config: Config,
    layout: Layout,
    role: Role,
    monitor: Monitor,
    lost: list[int],
    hosts: Sequence[str],
    complete: bool,
) -> dict[str, Any]:
    """Evaluate the final center at rank 0, write and print it and the result. Returns the result.

    `lost`: ranks that died; `hosts`: of all; `complete`: the run had all its steps before it was resumed, and
    keeps its result.
    """
    path = directory / "result.json"
    earlier = json.loads(path.read_text()) if complete and path.is_file() else {}
    if earlier.get("steps") == role.center.steps:
        monitor.stop("complete")
        monitor.say(f"the run was complete, at step {role.center.steps}; its result stays, in {directory}/")
        return dict(earlier)
    extra = about_ranks(role, lost, hosts)
    result = conclude(directory, asdict(repeatable(config)), layout, role, monitor, extra)
    summarize(result, monitor)
    if result["failed_evaluations"]:
        monitor.say(f"mend `evaluate`, and type: python -m agnmpi evaluate {directory}")
    if lost or result["failed_evaluations"]:
        monitor.say(f"exit code {DEGRADED if lost else UNEVALUATED}")
    return result


def summarize(result: Mapping[str, Any], monitor: Monitor, has_loss: bool = True) -> None:
    """Say how a run went; `has_loss`: whether it was told any."""
    if (result["loss"] is None and monitor.trained and has_loss) or None in result["metrics"].values():
        monitor.say("WARNING: the loss or a metric is not finite: the run has diverged; lower the rate")
    if result["refused"]:
        monitor.say(f"WARNING: {result['refused']} commits were refused: not finite, or not of this model")
    if result["given_up"]:
        monitor.say(f"WARNING: {result['given_up']} steps were given up: their commits were refused")
    if result["failed_evaluations"]:
        monitor.say(f"WARNING: {result['failed_evaluations']} evaluations failed")
    if result["lost"]:
        monitor.say(f"WARNING: the run ended without ranks {result['lost']}")
    metrics = f"{format_metrics(monitor.metrics, ', ')}; " if monitor.metrics else ""
    monitor.say(
        f"done: {metrics}{result['samples']} samples in {duration(result['seconds'])} "
        f"({digits(result['samples_per_second'])}/s), {result['commits']} commits, "
        f"staleness {result['staleness']['mean']:.2f} (max {result['staleness']['max']})"
    )
    if result["goodput"] is not None:
        monitor.say(f"goodput: {result['goodput']:.1%} of what the workers alive could have done undisturbed")
    for line in dropped_lines(result):
        monitor.say(line)
    monitor.say(f"written to {result['run_dir']}/")


def dropped_lines(result: Mapping[str, Any]) -> list[str]:
    """A message about dropped commits, if there were any."""
    if not result.get("dropped"):
        return []
    return [f"{result['dropped']} commits were too old and were dropped; their steps were done again"]


def headline(config: Config, layout: Layout, plan: Plan) -> str:
    """What is trained."""
    return (
        f"agnmpi {__version__}: {config.problem}, {layout.size:,} parameters ({layout.dtype}), "
        f"{plan.samples:,} samples, {plan.steps:,} steps of {plan.batch}"
    )


def centers_line(centers: Sequence[str], most: int = 8) -> str:
    """Where the center is.

    >>> centers_line(["rank 0 on a", "rank 3 on b", "rank 6 on c"], most=2)
    'centers: rank 0 on a, rank 3 on b and 1 more'
    """
    further = f" and {len(centers) - most} more" if len(centers) > most else ""
    return f"center{'s' if len(centers) > 1 else ''}: {', '.join(centers[:most])}{further}"


def node_centers_lines(config: Config, nodes: Sequence[tuple[str, int]], most: int = 8) -> list[str]:
    """Where the node centers are, if there shall be some; `nodes`: the name of each, and how many workers it has."""
    if not config.node_centers:
        return []
    if not nodes:
        return ["note: no node centers, since no host but that of rank 0 has three ranks"]
    further = f" and {len(nodes) - most} more" if len(nodes) > most else ""
    text = ", ".join(f"{name} for {workers} workers" for name, workers in nodes[:most])
    return [f"node center{'s' if len(nodes) > 1 else ''}: {text}{further}"]


def introduction(
    config: Config, layout: Layout, plan: Plan, role: Role, size: int, setup: "Setup", name: Callable[[int], str]
) -> list[str]:
    """Messages about a run of `size` ranks before it begins; `name` describes a rank."""
    workers, centers = role.count, list(map(name, setup.center_ranks))
    ranks = f"{size} rank{'s' if size > 1 else ''}" + f", {config.spares} of them spare" * (config.spares > 0)
    return [
        headline(config, layout, plan),
        f"rule {config.rule}, {workers} worker{'s' if workers > 1 else ''} ({ranks}), period {config.period}, "
        f"{config.optimizer} {config.rate:g}{f' (warmup {config.warmup})' * bool(config.warmup)}, center "
        f"{config.center_optimizer}, transport {config.transport}, {mpi_library()}",
        *([centers_line(centers)] if len(centers) > 1 or config.centers == "hosts" else ()),
        *advice(config.make_rule(), workers, config.period, config.adds),
        *([f"note: {setup.unthreaded}"] if setup.unthreaded else ()),
        *(unused_devices(device_count()) if config.device == "auto" else ()),
        *node_centers_lines(config, [(name(node), len(of)) for node, *of in setup.nodes]),
        *([f"WARNING: {role.caveat}"] if role.caveat else ()),
    ]
