"""The kernels on a piece of a vector on the host: by NumPy, or compiled by numba; both give the same numbers.

Of what was measured (tests/MEASURED.md) numba was the fastest: one pass, at the speed of memory. NumPy brings a block
through the cache once for each operation; numexpr writes one vector in a pass, and took six times as long for a step
of Adam. numba only compiles; the threads are our own (`kernels`), because those of its parallel loops are a second
pool of OpenMP or TBB beside that of BLAS, or (workqueue) must not be called by two threads at once.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import isfinite
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .backend import BLOCK, Array, empty
from .device_kernels import KERNELS, VECTORS, names

# --- by NumPy ---

# A step moves one block x against g, in place, with the block's slots, two scratch arrays and the method's scalars.
_Step: TypeAlias = Callable[..., None]


def _sgd(x: Array, g: Array, _slots: Sequence[Array], s: Array, _r: Array, eta: Array) -> None:
    x -= np.multiply(g, eta, out=s)


def _momentum(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: Array, beta: Array) -> None:
    (m,) = slots
    m *= beta
    m += g
    x -= np.multiply(m, eta, out=s)


def _nesterov(
    x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: Array, beta: Array, look: Array
) -> None:
    (m,) = slots
    m *= beta
    m += g
    np.multiply(m, look, out=s)
    s += g
    s *= eta
    x -= s


def _adagrad(x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: Array, epsilon: Array) -> None:
    (v,) = slots
    v += np.multiply(g, g, out=s)
    np.sqrt(v, out=s)
    s += epsilon
    np.multiply(g, eta, out=r)
    x -= np.divide(r, s, out=s)


def _rmsprop(
    x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: Array, rho: Array, fresh: Array, epsilon: Array
) -> None:
    (v,) = slots
    np.multiply(g, g, out=s)
    s *= fresh
    v *= rho
    v += s
    np.sqrt(v, out=s)
    s += epsilon
    np.multiply(g, eta, out=r)
    x -= np.divide(r, s, out=s)


def _adam(
    x: Array,
    g: Array,
    slots: Sequence[Array],
    s: Array,
    _r: Array,
    beta1: Array,
    fresh1: Array,
    beta2: Array,
    fresh2: Array,
    epsilon: Array,
    eta: Array,
) -> None:
    m, v = slots
    # The order that was fastest of several: g is used twice while it is in cache, and few calls take three vectors.
    np.multiply(g, fresh2, out=s)
    s *= g
    v *= beta2
    v += s
    np.multiply(g, fresh1, out=s)
    m *= beta1
    m += s
    np.sqrt(v, out=s)
    s += epsilon
    np.divide(m, s, out=s)
    s *= eta
    x -= s


class _Block(NamedTuple):
    """One block of a kernel's arguments: vectors (b,); scalars, and the same as 0-d arrays; three scratch vectors."""

    inputs: Sequence[Array]
    moved: Sequence[Array]
    scalars: Sequence[float]
    numbers: Sequence[Array]  # of the vectors' dtype: NumPy's calls cost less than with Python's numbers
    scratch: Sequence[Array]


def _step(step: _Step, block: _Block) -> None:
    """A step against d = scale·g + decay·x, from keep·x."""
    (g,), (x, *slots), (scale, decay, keep, *_), numbers, (s, r, scaled) = block
    if scale != 1:
        g = np.multiply(g, numbers[0], out=scaled)
    if decay:
        g = np.add(g, np.multiply(x, numbers[1], out=s), out=scaled)
    if keep != 1:
        x *= numbers[2]
    step(x, g, slots, s, r, *numbers[3:])


def _add(block: _Block) -> None:
    (delta,), (c,), (weight,), numbers, (s, *_) = block
    c += delta if weight == 1 else np.multiply(delta, numbers[0], out=s)


def _adopt(block: _Block) -> None:
    (c, sent), (x,), _, _, (s, *_) = block
    x += np.subtract(c, sent, out=s)


def _delta(block: _Block) -> bool:
    (x, o), (delta,), (k,), numbers, _ = block
    np.subtract(x, o, out=delta)
    if k != 1:
        delta /= numbers[0]
    return block_is_finite(delta)


def _elastic(block: _Block) -> bool:
    (x, c), (delta,), _, (alpha,), _ = block
    np.subtract(x, c, out=delta)
    delta *= alpha
    return block_is_finite(delta)


_BY_NUMPY: dict[str, Callable[[_Block], bool | None]] = {
    "sgd": partial(_step, _sgd),
    "momentum": partial(_step, _momentum),
    "nesterov": partial(_step, _nesterov),
    "adagrad": partial(_step, _adagrad),
    "rmsprop": partial(_step, _rmsprop),
    "adam": partial(_step, _adam),
    "add": _add,
    "adopt": _adopt,
    "delta": _delta,
    "elastic": _elastic,
}


def block_is_finite(x: Array) -> bool:
    """Whether `x` (n,) holds neither NaN nor infinity."""
    # A dot product is several times faster than isfinite; where it overflows, check each element.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(x @ x)
    return isfinite(squares) or bool(np.isfinite(x).all())


class _Scratch(threading.local):
    """Three blocks of each dtype for each thread: to allocate them takes longer than a step of a small model."""

    def __init__(self) -> None:
        self._kept: dict[np.dtype[Any], list[Array]] = {}

    def __call__(self, size: int, dtype: np.dtype[Any]) -> list[Array]:
        if dtype not in self._kept:
            self._kept[dtype] = [empty(BLOCK, dtype, np.empty(0)) for _ in range(3)]
        return [block[:size] for block in self._kept[dtype]]


_scratch = _Scratch()


def move_block(name: str, inputs: Sequence[Array], scalars: Sequence[float], moved: Sequence[Array]) -> bool | None:
    """Run the kernel `name` on vectors (b,) no longer than a block; returns what `kernels.run` does."""
    x = moved[0]
    numbers = [np.array(scalar, x.dtype) for scalar in scalars]
    return _BY_NUMPY[name](_Block(inputs, moved, scalars, numbers, _scratch(x.size, x.dtype)))


# --- compiled ---


def _squares(x: Array) -> float:
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


def _finite(x: Array) -> bool:
    bad = False
    for i in range(x.size):
        bad |= not np.isfinite(x[i])
    return not bad


def _loop(name: str) -> Any:
    """The kernel `name` as a Python function: the C expression of one element is Python as well, but for its types."""
    inputs, inouts, code = KERNELS[name]
    moved = names(inouts)
    vectors = [p for p in names(inputs) if p in VECTORS] + moved
    arguments = [f"{p}_" if p in vectors else p for p in names(inputs) + moved]
    lines = [
        *(f"{p} = {p}_[i]" for p in vectors),
        code.replace("const T ", "").replace(", ", "; "),
        *(f"{p}_[i] = {p}" for p in moved),
        *(f"bad |= not isfinite({p})" for p in moved if p == "delta"),
    ]
    text = "\n        ".join(lines)
    scope: dict[str, Any] = {"sqrt": np.sqrt, "isfinite": np.isfinite}
    exec(
        f"def {name}({', '.join(arguments)}):\n    bad = False\n    for i in range({moved[0]}_.size):\n        {text}\n"
        f"    return {'not bad' if moved == ['delta'] else 'None'}",
        scope,
    )
    return scope[name]


def find_numba(what: str) -> ModuleType | None:
    """Import numba, which takes a moment at first; None where it is not installed.

    Warns, naming `what` is NumPy's then, of one that cannot be used, such as with a NumPy that it does not know.
    """
    try:
        import numba
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"numba cannot be used, so {what} are NumPy's: {error}", RuntimeWarning, 3)
        return None
    return numba  # type: ignore[no-any-return]


@cache
def compiled(name: str) -> Callable[..., Any] | None:
    """The kernel, or reduction, `name`, compiled at its first call for each dtype; None without numba.

    It takes the arguments of its Body in order, and returns what `kernels.run` does; of a reduction its result. Each
    rank compiles for itself, 0.1 to 0.4 s for a kernel, and no file is written: numba's cache, in one directory for
    hosts with different processors, can mix up their code where they write at once.
    """
    numba = find_numba("the host's kernels")
    if numba is None:
        return None
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # NumPy's: no exception at a division by 0
    if name == "squares":  # a sum in order would not be vectorised
        return numba.njit(_squares, fastmath={"reassoc"}, **options)  # type: ignore[no-any-return]
    return numba.njit(_finite if name == "finite" else _loop(name), **options)  # type: ignore[no-any-return]
