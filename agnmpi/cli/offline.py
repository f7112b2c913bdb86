"""The arguments of commands that train nothing of their own: most are of one process, and need no MPI."""

from typing import Any

OFFLINE = ("export", "evaluate", "runs", "report", "capi")


def add_models(commands: Any) -> None:
    """Add `export` and `evaluate`."""
    source = "a run; or RUN/checkpoints/step-N, RUN/best.safetensors"
    export = commands.add_parser(
        "export",
        help="write the model of a run, or of a checkpoint, to a file",
        description="Write the parameters by name: of a run's end, or of its newest checkpoint. Needs no MPI.",
    )
    export.add_argument("run", metavar="RUN", help=source)
    export.add_argument("file", metavar="FILE", help="a new file that ends in .safetensors or .npz")
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate the model of a run, or of a checkpoint",
        description="Create the run's problem, and print as JSON what its `evaluate` says of the model. Needs no MPI.",
    )
    evaluate.add_argument("run", metavar="RUN", help=source)
    evaluate.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"), help="where to compute")


def add_join(commands: Any) -> None:
    """Add `join`, which does need MPI."""
    join = commands.add_parser(
        "join",
        help="become workers of a run that is under way (MPICH)",
        usage="mpiexec -n P python -m agnmpi join RUN",
        description="Train, on each rank, as one more worker of a run that was started with --joinable and is under "
        "way; with its configuration, up to its end. A rank that dies, or leaves at a signal, costs the run what it "
        "had not committed, no more.",
    )
    join.add_argument("run", metavar="RUN", help="the run's directory, which both jobs see")


def add_reports(commands: Any) -> None:
    """Add `runs` and `report`."""
    runs = commands.add_parser(
        "runs",
        help="list runs: how they ended, their metrics, what differs",
        description="A line for each run: state, workers, time, metrics, and the options in which the runs differ. "
        "Needs no MPI.",
    )
    runs.add_argument("directories", nargs="*", default=["runs"], metavar="DIR", help="runs, or what holds them")
    report = commands.add_parser(
        "report",
        help="write a page with figures about a run, or several side by side",
        description="Write one HTML page: learning curves, throughput, staleness, workers, what happened, options. "
        "It needs no other file and no network. Needs no MPI.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="runs, or directories that hold them")
    report.add_argument("-o", "--output", metavar="FILE", help="the page [default: report.html in, or beside, the run]")
    report.add_argument("--png", action="store_true", help="a picture of it, too, beside it; needs Chromium or Chrome")


def add_capi(commands: Any) -> None:
    """Add `capi`."""
    capi = commands.add_parser(
        "capi",
        help="build the library for solvers in C and Fortran",
        description="Write libagnmpi.so, agnmpi.h and agnmpi.f90 to a directory, for this Python environment and the "
        "MPI of a compiler, and print what compilers need to be told.",
    )
    capi.add_argument("directory", metavar="DIR", help="is made if need be")
    capi.add_argument(
        "--mpicc", metavar="CC", help="MPI's C compiler [default: mpicc beside this Python, $MPICC, or mpicc on PATH]"
    )
