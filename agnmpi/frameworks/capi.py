"""What libagnmpi.so calls: a run in situ for C and Fortran.

Nothing is raised: a call returns 0, or 1 after it has said what is wrong. c/agnmpi.h describes the calls.
"""

import ctypes
import functools
import importlib.util
import inspect
import sys
import tomllib
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias

import numpy as np

from ..arrays.backend import Array
from ..core.optimizers import OPTIMIZERS
from ..training.user_code import user_frames

if TYPE_CHECKING:
    from .insitu import Run

Given: TypeAlias = tuple[memoryview, tuple[int, ...], str]  # memory, shape and dtype of an array of C's
P = ParamSpec("P")
_REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)  # of these the user's frames are enough
_run: "Run | None" = None
_first = True  # whether this rank is the first of the run's, which says what is wrong on all of them
_error = ""


def _call(function: Callable[P, None]) -> Callable[P, int]:
    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> int:
        try:
            function(*args, **named)
        except BaseException as error:
            _say(function.__name__, error)
            return 1
        return 0

    return call


def _say(call: str, error: BaseException) -> None:
    """Keep what is wrong for agn_error, and print it; what is so on all ranks, on the first alone."""
    global _error
    where, said = "", False
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        from ..transport.agreement import ConfigError

        if MPI.Is_initialized() and not MPI.Is_finalized():
            where = f"rank {MPI.COMM_WORLD.rank} on {MPI.Get_processor_name()}: "
            said = isinstance(error, ConfigError) and not _first
    text = user_frames(error) if isinstance(error, _REFUSALS) else "".join(traceback.format_exception(error)).rstrip()
    _error = f"{where}agn_{call}: {text}"
    if not said:
        sys.stderr.write(f"agnmpi: {_error}\n")


def error() -> str:
    """What the last error was."""
    return _error


def abort() -> None:
    """End the job after an error, unless the program wants to know of it."""
    if "mpi4py.MPI" not in sys.modules:
        return
    from mpi4py import MPI

    from ..training import abort as ending

    if MPI.Is_initialized() and not MPI.Is_finalized():
        ending.abort(MPI.COMM_WORLD, 1)


def use_mpi_at(address: int) -> None:
    """Import mpi4py so that it leaves MPI to the program.

    Args:
        address: of PMPI_Get_library_version in the MPI library of the program.

    Raises:
        RuntimeError: where mpi4py is of another MPI library; mpi4py.MPI is not imported then: with another's handles
            it would crash.
    """
    import mpi4py

    # The program starts MPI, ends it, and has set what becomes of its errors.
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    mpi4py.rc.errors = "default"
    program, remedy = _version(address), "build mpi4py with the program's mpicc, and the library again"
    spec = importlib.util.find_spec("mpi4py.MPI")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"mpi4py is not made for the program's MPI, {program}: {remedy}")
    try:
        own = ctypes.cast(ctypes.CDLL(spec.origin).PMPI_Get_library_version, ctypes.c_void_p).value
    except OSError as error:
        raise RuntimeError(f"mpi4py is not made for the program's MPI, {program} ({error}): {remedy}") from None
    assert own is not None
    if own != address:
        raise RuntimeError(f"the program's MPI is {program}, mpi4py's is another, {_version(own)}: {remedy}")


def _version(address: int) -> str:
    """Name, version and file of the MPI library with PMPI_Get_library_version at `address`."""
    text, length = ctypes.create_string_buffer(8192), ctypes.c_int()
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))(address)(text, ctypes.byref(length))
    line = text.value.decode(errors="replace").split("\n")[0].split(",")[0]
    return " ".join(line.replace("Version:", "").split())


@_call
def open(spec: str, comm: int, period: int, options: str | None, address: int) -> None:
    """Begin a run; collective.

    Args:
        spec: FILE.py:NAME of the surrogate.
        comm: the Fortran handle of the communicator.
        period: steps between exchanges.
        options: others of `Run`, as TOML writes them in an inline table.
        address: as `use_mpi_at` has it.
    """
    global _run, _first
    if _run is not None and not _run.closed:
        raise RuntimeError("a run is open: call agn_close first")
    use_mpi_at(address)
    from mpi4py import MPI

    from ..transport.agreement import raise_on_all
    from .insitu import Run

    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError("MPI runs from MPI_Init to MPI_Finalize: call agn_open, and agn_close, between them")
    group = MPI.Comm.f2py(comm)
    if not isinstance(group, MPI.Intracomm):
        raise TypeError("comm must be an intracommunicator: MPI_Comm_c2f(comm) in C, comm%mpi_val with mpi_f08")
    _first = group.rank == 0
    _run = Run(spec, group, period, **raise_on_all(group, lambda: _options(options or "", inspect.signature(Run))))


def _options(text: str, signature: inspect.Signature) -> dict[str, Any]:
    """Keyword arguments of `Run` from `text`; raises ValueError for what it does not know."""
    from mpi4py import MPI

    try:
        given: dict[str, Any] = tomllib.loads(f"given = {{{text}}}")["given"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"options {text!r} are not NAME = VALUE, …, as in TOML: {error}") from None
    name, rate = given.pop("optimizer", "adam"), given.pop("rate", 0.001)
    known = set(signature.parameters) - {"surrogate", "comm", "period"}
    if unknown := set(given) - known:
        raise ValueError(f"there is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}, rate")
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    if "solver" in given:
        given["solver"] = MPI.Comm.f2py(given["solver"])
    return given | {"optimizer": OPTIMIZERS[name](rate)}


@_call
def serve() -> None:
    """Serve until all others have left."""
    for _ in _opened().serve():
        pass


@_call
def put(x: Given, y: Given) -> None:
    """Offer samples x (m, …), y (m, …)."""
    _opened().put(_array(x, "x"), _array(y, "y"))


@_call
def learn(budget: float, taken: Given) -> None:
    """Train; writes the number of steps to `taken`."""
    _array(taken)[...] = _opened().learn(budget)


@_call
def predict(x: Given, y: Given) -> None:
    """Write the prediction from x (m, …) to y."""
    predicted, out = np.asarray(_opened().predict(_array(x, "x"))), _array(y, "y")
    if predicted.shape != out.shape:
        raise ValueError(f"the prediction has shape {predicted.shape}, y has {out.shape}")
    out[...] = predicted


@_call
def pull(arrived: Given) -> None:
    """On a rank that reads: ask for the newest center; writes whether one has come."""
    _array(arrived)[...] = _opened().pull()


@_call
def params(name: str, values: Given) -> None:
    """Write a parameter to `values` (size,)."""
    named, out = _opened().params, _array(values, "values")
    if name not in named:
        raise ValueError(f"there is no parameter {name!r}; there are {', '.join(named)}")
    x = named[name]
    if x.size != out.size:
        raise ValueError(f"parameter {name!r} has {x.size} numbers, of shape {x.shape}, not {out.size}")
    out[...] = x.ravel()


@_call
def step(steps: Given, loss: Given) -> None:
    """Write the steps of this rank and of all to `steps` (2,), and this rank's last loss."""
    status = _opened().status
    _array(steps)[:], _array(loss)[...] = (status.steps, status.all_steps), status.loss


@_call
def done(answer: Given) -> None:
    """Write whether the run is done."""
    _array(answer)[...] = _opened().done


@_call
def stop() -> None:
    """Let the run be done on all ranks."""
    _opened().stop()


@_call
def save(path: str | None) -> None:
    """Write the center as this rank has it."""
    if not path:
        raise ValueError("path is NULL, or empty")
    _opened().save(path)


@_call
def close(path: str | None) -> None:
    """End the run; collective."""
    _opened().close(path)


def _opened() -> "Run":
    if _run is None:
        raise RuntimeError("no run is open: call agn_open first")
    return _run


def _array(given: Given, name: str = "") -> Array:
    memory, shape, dtype = given
    if not dtype:
        raise ValueError("the type of an array must be AGN_FLOAT or AGN_DOUBLE")
    if min(shape, default=0) < 0 or (not memory and 0 not in shape):
        raise ValueError(f"{name} is NULL, or its shape {shape} cannot be")
    made: Array = np.ndarray(shape, dtype, memory)
    return made
