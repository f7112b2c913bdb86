"""The user's code: errors in it are shown by its own frames, and what it returns wrongly says what to return."""

import concurrent.futures
import dis
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arrays.backend import Array
from ..core.params import Layout

# Of ours, of the import, and of the threads in which we call the user's code.
_NOT_THE_USERS = str(Path(__file__).parent.parent), "<frozen importlib", str(Path(concurrent.futures.__file__).parent)


class UserCodeError(ValueError):
    """The user's code has failed; the message holds its own frames."""


def user_frames(error: BaseException) -> str:
    """The traceback of `error` from the user's first frame on, and what it says; without frames of ours before it."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        tb = tb.tb_next
    lines = [*traceback.format_tb(tb), *traceback.format_exception_only(error)]
    if isinstance(error, ImportError) and "relative import" in str(error):
        lines.append(
            "A file alone is no part of a package: start where the package lies and give the module's name, "
            "such as package.module:Problem\n"
        )
    return "".join(lines).rstrip()


def report_failure(rank: str, step: int, error: BaseException) -> None:
    """Say at once, in one write, with its frames, that the user's code has failed on `rank` in `step`."""
    sys.stdout.flush()
    sys.stderr.write(
        f"agnmpi: {rank} failed in step {step}; the others commit what they have done, then the job ends:\n"
        f"Traceback (most recent call last):\n{user_frames(error)}\n"
    )
    sys.stderr.flush()


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Raise UserCodeError, which says `what` failed, for any exception of the user's code in the block."""
    try:
        yield
    except UserCodeError:
        raise
    except Exception as error:
        raise UserCodeError(f"{what}:\n{user_frames(error)}") from error


def where(function: Callable[..., Any]) -> str:
    """The name of a function, and where it is written."""
    name, function = getattr(function, "__qualname__", repr(function)), inspect.unwrap(function)
    try:
        return f"{name} ({inspect.getsourcefile(function)}, line {inspect.getsourcelines(function)[1]})"
    except (OSError, TypeError):
        return name


def remarks(gradient: Callable[..., Any]) -> list[str]:
    """What is odd about a problem's `gradient`: that it never reads the parameters that it is given.

    Its bytecode says so, for certain: no load of its first argument. One that reads and ignores them is not found.

    >>> class Constant:
    ...     def gradient(self, params, indices):
    ...         return 0.0, {"w": 1.0}
    >>> len(remarks(Constant().gradient))
    1
    """
    code, index = getattr(gradient, "__code__", None), int(inspect.ismethod(gradient))
    if code is None or hasattr(gradient, "__wrapped__") or code.co_argcount <= index:  # decorated, or takes *args
        return []
    name, looks_around = code.co_varnames[index], {"locals", "vars", "eval", "exec"} & set(code.co_names)
    loads = [i.argval for i in dis.get_instructions(code) if "LOAD_FAST" in i.opname]  # of two at once from 3.13 on
    read = any(name in (loaded if isinstance(loaded, tuple) else (loaded,)) for loaded in loads)
    if read or looks_around or name in code.co_cellvars:
        return []
    return [
        f"WARNING: {where(gradient)} never reads {name!r}, the parameters that it is given and that training moves: "
        "is the gradient of others computed?"
    ]


def loss_and_gradients(returned: Any, layout: Layout, function: Callable[..., Any]) -> tuple[float, Mapping[str, Any]]:
    """Check what a problem's `gradient` has returned; a sequence of gradients is taken in the order of the parameters.

    Raises UserCodeError, which says what to return.
    """
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise _wrong(function, f"(loss, gradients), not {_describe(returned)}")
    loss, gradients = returned
    if isinstance(loss, Mapping):
        raise _wrong(function, "(loss, gradients), in this order: it returned the gradients first")
    try:
        number = _number(loss)
    except (TypeError, ValueError, RuntimeError):
        text = f"(loss, gradients); the loss is one number, the mean over the batch, not {_describe(loss)}"
        raise _wrong(function, text) from None
    if isinstance(gradients, Mapping):
        return number, gradients
    if isinstance(gradients, Sequence) and len(gradients) == len(layout.names):
        return number, dict(zip(layout.names, gradients))
    text = f"(loss, gradients); gradients has an array for each of {', '.join(layout.names)}, by name"
    raise _wrong(function, f"{text}, not {_describe(gradients)}")


def pack_gradients(returned: Any, layout: Layout, function: Callable[..., Any], g: Array) -> float:
    """Write the gradients that a problem's `gradient` has returned to `g` (n,), and return the loss.

    Raises UserCodeError, which says what to return.
    """
    loss, gradients = loss_and_gradients(returned, layout, function)
    try:
        layout.pack(gradients, out=g)
    except (TypeError, ValueError) as error:
        raise UserCodeError(f"the gradients of {where(function)} do not fit: {error}") from None
    return loss


def metrics(returned: Any, function: Callable[..., Any]) -> dict[str, float]:
    """Check what `evaluate` has returned; raises UserCodeError, which says what to return."""
    wanted = "numbers by name, such as {'accuracy': 0.98}"
    if not isinstance(returned, Mapping):
        raise _wrong(function, f"{wanted}, not {_describe(returned)}")
    numbers = {}
    for name, value in returned.items():
        try:
            numbers[str(name)] = _number(value)
        except (TypeError, ValueError, RuntimeError):
            raise _wrong(function, f"{wanted}; {name!r} is {_describe(value)}") from None
    return numbers


def _wrong(function: Callable[..., Any], text: str) -> UserCodeError:
    return UserCodeError(f"{where(function)} must return {text}")


def _number(value: Any) -> float:
    """A number, also of an array or a tensor with one element."""
    return float(value.item() if hasattr(value, "item") else value)


def _describe(value: Any) -> str:
    if value is None:
        return "None: a `return` is missing"
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} with {', '.join(map(str, list(value)[:5])) or 'nothing in it'}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)}"
    return f"{value!r}" if isinstance(value, int | float | str) else f"a {kind}"
