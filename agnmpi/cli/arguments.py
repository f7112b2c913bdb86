"""The arguments of the command line."""

import argparse
import contextlib
import difflib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..arrays.encodings import NAMES
from ..simulation.timing import Timing
from ..training.config import Config
from ..transport.registry import entries
from ..version import __version__
from .flags import add_fields
from .offline import add_capi, add_join, add_models, add_reports

_TRANSPORTS = [entry.name for entry in entries() if entry.floor]
# Fixed values of options of `train`: in a simulation, and where a problem is measured, with each transport.
SIMULATED = {
    "transport": "local", "resume": None, "stall_limit": 0.0, "drop_stalled": False, "spares": 0, "joinable": False,
}  # fmt: skip
BENCHED = SIMULATED | {"transport": "auto", "workers": 1, "wait": True, "overlap": False, "dylu": False}
BENCHED |= {"record": False}
_UTILISATION = """\
Measure how much of their time the workers compute, for each transport and
encoding, without and with overlap. A step sleeps, as a host does while its GPU
computes, and then moves the parameters by SGD; each λ steps a worker exchanges
with the center.

  n         workers
  period    seconds of λ steps and an exchange, by the clock on the wall
  compute   seconds of the same λ steps where nobody exchanges: the sleep, and
            our own work, which is the optimizer's, forming the delta and taking
            up the new center; on all workers at once, between the rows
  exchange  period - compute: what the exchange costs, by waiting or by the
            processor time that it takes from the steps
  utilised  compute/period, the mean over the workers; lowest: of the worst one
  hidden    with overlap, the share of the exchange that goes by while the next
            period is computed: 1 - exchange/(exchange without overlap); a dash
            where the exchange is too short beside this machine's noise
  bytes     of the vectors that a worker sends and receives in one exchange;
            with "no wait" there may be fewer exchanges: one in λ steps or more

A number is the mean over the periods of a round, its first two left out; of the
rounds the median, and of the workers the mean."""
_PROBLEM = """\
Measure a problem's own steps, on all workers at once, and exchanges of its
parameters by each transport that fits, at this world, and say in words which
options suit them. Options of train that change what a step or an exchange costs
hold here, too.

  n            workers
  alone        an exchange of one worker while the others do nothing, after a
               pause of 20 ms, in which the center goes to sleep
  all at once  of each worker, where all exchange and nobody computes
  1 number     as alone, of a single number instead: the latency, which no
               encoding shortens
  MB/s         bytes of the vectors, both ways, over the seconds alone
  λ            the smallest period for which a worker waits less than 5 % of its
               time. In between, exchanges meet at the center as in a queue
  hidden       share of an exchange that overlap hides, where a period's steps
               take about as long as the exchange
  λ overlap    the smallest period with overlap

At the end the choice is tried, unless a period takes longer than --seconds; and
longer periods, where workers wait too much with it."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="agnmpi",
        description="Asynchronous training over MPI with Accumulated Gradient Normalization.",
        epilog="Start it with mpiexec: mpiexec -n 4 python -m agnmpi train examples/digits.py:Digits",
    )
    top.add_argument("--version", action="version", version=f"agnmpi {__version__}")
    _add_commands(top)
    return top


def _add_commands(top: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Add the commands; returns their parsers by name."""
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sweep(commands)
    add_join(commands)
    _add_simulate(commands)
    _add_bench(commands)
    _add_bench_utilisation(commands)
    _add_bench_problem(commands)
    _add_doctor(commands)
    add_models(commands)
    add_reports(commands)
    add_capi(commands)
    parsers: Mapping[str, argparse.ArgumentParser] = commands.choices
    return parsers


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure exchanges and optimizers against the limit of this machine",
        description="Measure, side by side in one run, exchanges against bare mpi4py calls and memcpy, what a worker "
        "does for an exchange besides the wire, and host optimizers against memcpy. The exchange part needs "
        "mpiexec -n 2 or more. Of other things: `agnmpi bench utilisation`, how much of their time workers compute; "
        "`agnmpi bench MODULE:PROBLEM`, which options suit a problem.",
    )
    bench.add_argument("--sizes", type=int, nargs="+", default=[1, 1_000_000], metavar="N", help="float32 numbers")
    _add_transports(bench)
    bench.add_argument(
        "--workers", type=int, nargs="+", default=[], metavar="N", help="numbers of workers [default: all]"
    )
    bench.add_argument(
        "--pack-only", action="store_true", help="no wire: only forming the delta and adopting the center"
    )
    bench.add_argument(
        "--rounds", type=int, default=200, help="exchanges of each worker and side, in 20 rounds [default: 200]"
    )
    bench.add_argument("--quiet", type=int, default=10, metavar="ROUNDS", help="rounds of waiting; 0: none")
    bench.add_argument(
        "--optimizer-size",
        type=int,
        default=10_000_000,
        metavar="N",
        help="numbers in the vector for the optimizers' bandwidth; 0: none",
    )
    _add_device_and_json(bench)


def _add_bench_utilisation(commands: Any) -> None:
    bench = commands.add_parser(
        "bench utilisation",
        help="measure how much of their time workers compute",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mpiexec -n P python -m agnmpi bench utilisation [options]",
        description=_UTILISATION,
    )
    bench.add_argument(
        "--step", type=float, default=0.02, metavar="S", help="seconds a step sleeps, as for a GPU [default: 0.02]"
    )
    bench.add_argument(
        "--slowest",
        type=float,
        default=1.0,
        metavar="X",
        help="the last rank's steps sleep X times as long [default: 1]",
    )
    bench.add_argument(
        "--parameters", type=int, default=1_000_000, metavar="N", help="float32 numbers [default: 1000000]"
    )
    bench.add_argument("--period", type=int, default=10, metavar="N", help="λ, steps between exchanges [default: 10]")
    _add_transports(bench)
    bench.add_argument(
        "--encodings", nargs="+", default=["float32", "int8"], choices=NAMES, metavar="NAME",
        help=f"of {', '.join(NAMES)}, both ways, where a transport has them [default: float32 int8]",
    )  # fmt: skip
    bench.add_argument(
        "--periods", type=int, default=4, metavar="N", help="periods measured in each round [default: 4]"
    )
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of all rows [default: 3]")
    bench.add_argument("--no-wait", action="store_true", help="rows, too, in which workers go on during an exchange")
    _add_device_and_json(bench)


def _add_bench_problem(commands: Any) -> None:
    bench = commands.add_parser(
        "bench problem",
        help="measure a problem's steps and exchanges, and say which options suit them",
        usage="mpiexec -n P python -m agnmpi bench MODULE:PROBLEM [options]",
        description=_PROBLEM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_sources(bench, "as in train")
    _add_transports(bench)
    bench.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="how long each part is measured [default: 1]"
    )
    bench.add_argument("--json", metavar="FILE", default=None, help="write the results to it, too")
    unused = [f.name for f in fields(Config) if f.metadata["group"] in ("output", "checkpoint")]
    add_fields(bench, Config, (*BENCHED, *unused, "epochs", "steps"))


def _add_transports(bench: Any) -> None:
    bench.add_argument(
        "--transports", nargs="+", default=_TRANSPORTS, choices=_TRANSPORTS, metavar="NAME",
        help=f"of {', '.join(_TRANSPORTS)}",
    )  # fmt: skip


def _add_device_and_json(bench: Any) -> None:
    bench.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="where the workers' vectors lie")
    bench.add_argument("--json", metavar="FILE", help="write the results to it, too")


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what MPI, which roles and devices the ranks would get, and what is missing",
        description="Show what MPI, which roles and devices each rank would get, what is missing and what to type. "
        "Under mpiexec it reports the whole world.",
    )
    doctor.add_argument("--period", type=int, default=10, help="communication period λ, for the advice")
    doctor.add_argument("--probe", action="store_true", help="try device pointers again, whatever is remembered")
    doctor.add_argument(
        "--encodings", action="store_true", help="measure what encoding takes here, and say on which link it pays"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a problem",
        usage="mpiexec -n P python -m agnmpi train MODULE:PROBLEM [options]",
        description="Train a problem: rank 0 holds the center, all others train (with rules "
        "synchronous and diloco every rank trains). All options can also stand in a TOML file (--config), under the "
        "same names; options given here override it, and --set overrides both.",
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("--inject-faults", action="store_true", default=False, help=argparse.SUPPRESS)  # for tests
    _add_sources(train, "set any option, also in a table: --set options.hidden=64 --set optimizer_options.beta1=0.8")
    add_fields(train, Config)
    train.add_argument(  # TensorFlow's option
        "--use-locking", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS
    )


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train a problem for each point of a grid of options, in one world",
        usage="mpiexec -n P python -m agnmpi sweep MODULE:PROBLEM\n"
        "           --grid KEY=VALUE,VALUE… [--grid …] [options]",
        description="Train a run for each combination of the values of --grid, each in a directory of its own. Started "
        "again with the same --run-dir, it trains what has no result yet. All options of train hold here, too.",
        argument_default=argparse.SUPPRESS,
    )
    sweep.add_argument("--inject-faults", action="store_true", default=False, help=argparse.SUPPRESS)  # for tests
    _add_sources(sweep, "as in train")
    text = "values of an option, with _ for -: --grid rate=1e-3,1e-2 --grid options.hidden=64,128"
    sweep.add_argument("--grid", action="append", default=[], metavar="KEY=VALUE,VALUE…", help=text)
    text = "the world is divided into groups of N ranks, which train at the same time [default: all]"
    sweep.add_argument("--ranks-per-run", type=int, default=None, metavar="N", help=text)
    add_fields(sweep, Config, ("resume",))


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
    _add_sources(simulate, "as in train")
    simulate.add_argument(
        "--timing-only",
        action="store_true",
        default=False,
        help="no gradients: throughput and staleness from n, λ, bytes, bandwidth and shards",
    )
    simulate.add_argument(
        "--replay", metavar="RUN", default=None, help="repeat RUN, of train --record, message for message"
    )
    add_fields(simulate, Config, (*SIMULATED, "message_buffers", "wire", "center_device"), hidden=("checkpoint",))
    add_fields(simulate, Timing)


def _add_sources(command: Any, about_set: str) -> None:
    """Add the problem, a file of options, and --set."""
    command.add_argument("problem", nargs="?", metavar="MODULE:PROBLEM", help=_field("problem").metadata["help"])
    command.add_argument("--config", metavar="FILE", help="TOML file; RUN/config.toml repeats a run", default=None)
    command.add_argument("--set", action="append", dest="sets", metavar="KEY=VALUE", default=[], help=about_set)


def _field(name: str) -> Any:
    return next(f for f in fields(Config) if f.name == name)


class HelpAsked(Exception):
    """--help or --version, to be printed by one rank."""


class ArgumentsRefused(Exception):
    """Invalid arguments; the parser's message, to be printed by one rank."""


def _join_commands(argv: Sequence[str]) -> Sequence[str]:
    """Join the words of `bench utilisation`, a command of its own; `bench MODULE:PROBLEM` is `bench problem` of it."""
    if len(argv) < 2 or argv[0] != "bench":
        return argv
    if argv[1] in ("utilisation", "problem"):
        return [f"bench {argv[1]}", *argv[2:]]
    return ["bench problem", *argv[1:]] if ":" in argv[1] else argv


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; usage errors and --help raise their text, so that one rank alone prints it."""
    output, words = io.StringIO(), _join_commands(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return parser().parse_args(words)
    except SystemExit as request:
        if request.code in (0, None):
            raise HelpAsked(output.getvalue()) from None
        raise ArgumentsRefused(_with_suggestions(output.getvalue(), words)) from None


def _with_suggestions(message: str, argv: Sequence[str]) -> str:
    """A refusal with the options of this command that misspelt ones are like, or the commands that have them.

    >>> _with_suggestions("agnmpi: error: unrecognized arguments: --perod 3", ["train"])
    'agnmpi: error: unrecognized arguments: --perod 3; did you mean --period?\\n'
    >>> _with_suggestions("agnmpi: error: unrecognized arguments: --replay run", ["train"])
    'agnmpi: error: unrecognized arguments: --replay run; --replay is an option of simulate\\n'
    """
    _, found, words = message.rpartition("unrecognized arguments: ")
    options = {name: _options_of(command) for name, command in _add_commands(argparse.ArgumentParser()).items()}
    called = next((word for word in argv if word in options), None)
    if not found or called is None:
        return message
    hints, near, known = list[str](), list[str](), {option for own in options.values() for option in own}
    for word in [word.partition("=")[0] for word in words.split() if word.startswith("--")]:
        for match in difflib.get_close_matches(word, sorted(known), 1):
            holders = [name for name, own in options.items() if match in own]
            if called in holders:
                near.append(match)
            else:
                hints.append(f"{match} is an option of {', '.join(holders)}")
    hints += [f"did you mean {', '.join(near)}?"] if near else []
    return f"{'; '.join([message.rstrip(), *hints])}\n"


def _options_of(command: argparse.ArgumentParser) -> list[str]:
    """Its options, also earlier spellings; not what only tests use."""
    return [
        option
        for action in command._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest != "inject_faults"
    ]
