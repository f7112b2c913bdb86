"""Fused kernels for devices: one pass over memory, each vector read once and written once.

A kernel is a short C expression over one element. CuPy compiles it for float32 and for float64; T is the vectors'
dtype, and scalars, computed on the host in double, are rounded to it, as NumPy does. Each body reads all its
inputs before it writes: the compiler cannot assume that the vectors do not overlap, and would reload them.
"""

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from .backend import Array, namespace


class Body(NamedTuple):
    """A kernel's arguments, in this order, and its code for one element."""

    inputs: str  # vectors and scalars that it reads
    inouts: str  # vectors that it moves in place, or writes
    code: str


VECTORS = {"g", "x", "o", "c", "sent", "delta"}  # the inputs that are vectors; the others are scalars


def names(parameters: str) -> list[str]:
    """The names in a Body's list of parameters."""
    return [parameter.split()[-1] for parameter in parameters.split(", ")]


def _step(slots: str, scalars: str, code: str) -> Body:
    """An optimizer's kernel: d = scale·g + decay·x is its gradient, y = keep·x its starting point.

    scale: clipping, weight at the center, sign; decay: w of coupled weight decay; keep: 1 − ηw of the decoupled.
    """
    inouts = f"T x, {slots}" if slots else "T x"
    return Body(
        f"T g, T scale, T decay, T keep, {scalars}", inouts, f"const T d = scale * g + decay * x, y = keep * x; {code}"
    )


KERNELS = {
    # Optimizers: as the functions of these names in `core.optimizers`, with the same scalars in the same order.
    "sgd": _step("", "T eta", "x = y - eta * d;"),
    "momentum": _step("T m", "T eta, T beta", "const T u = beta * m + d; m = u; x = y - eta * u;"),
    "nesterov": _step("T m", "T eta, T beta", "const T u = beta * m + d; m = u; x = y - eta * (beta * u + d);"),
    "adagrad": _step("T v", "T eta, T epsilon", "const T u = v + d * d; v = u; x = y - eta * d / (sqrt(u) + epsilon);"),
    "rmsprop": _step(
        "T v",
        "T eta, T rho, T fresh, T epsilon",
        "const T u = rho * v + fresh * (d * d); v = u; x = y - eta * d / (sqrt(u) + epsilon);",
    ),
    "adam": _step(
        "T m, T v",
        "T beta1, T fresh1, T beta2, T fresh2, T epsilon, T eta",
        "const T p = beta1 * m + fresh1 * d, q = beta2 * v + fresh2 * d * d; "
        "m = p; v = q; x = y - eta * (p / (sqrt(q) + epsilon));",
    ),
    # Rules.
    "delta": Body("T x, T o, T k", "T delta", "delta = (x - o) / k;"),
    "elastic": Body("T x, T c, T alpha", "T delta", "delta = alpha * (x - c);"),
    "adopt": Body("T c, T sent", "T x", "x = x + (c - sent);"),
    "add": Body("T delta, T weight", "T c", "c = c + weight * delta;"),
}

# Reductions: each of `lanes` threads reduces every lanes-th element of x, and writes its partial result. By
# CuPy's sources its own ReductionKernel, without nvcc on the machine (pip's wheels need none), reduces a vector to one
# number by a single block of threads, on one of a hundred multiprocessors (not measured so far:
# tests/support/gpu_reductions.py).
_LANES = 1 << 16
_LOOP = "for (ptrdiff_t j = i; j < x.size(); j += _ind.size())"
REDUCTIONS = {
    "squares": Body("raw T x", "float64 y", f"double s = 0; {_LOOP} {{ const double v = x[j]; s += v * v; }} y = s;"),
    "finite": Body("raw T x", "bool y", f"bool s = true; {_LOOP} s = s & bool(isfinite(x[j])); y = s;"),
}


@cache
def kernel(xp: ModuleType, name: str) -> Any:
    """The kernel `name` as an ElementwiseKernel of `xp`; made once, compiled at the first launch for each dtype."""
    return xp.ElementwiseKernel(*(KERNELS | REDUCTIONS)[name], f"agnmpi_{name}")


def launch(name: str, first: Array, *rest: Array | float) -> None:
    """Run the kernel `name`, one launch on the current stream, on device vectors (n,) and scalars.

    The arguments stand in the order of its Body: inputs, then those that are moved in place.
    """
    kernel(namespace(first), name)(first, *rest)


def partial_results(name: str, x: Array) -> Any:
    """Partial results of the reduction `name` over a device vector `x` (n,), one per thread: one launch, no wait.

    Returns a device vector as long as there are threads, of float64 ("squares") or bool ("finite").
    """
    xp = namespace(x)
    partial = xp.empty(max(1, min(x.size, _LANES)), REDUCTIONS[name].inouts.split()[0])
    kernel(xp, name)(x, partial)
    return partial
