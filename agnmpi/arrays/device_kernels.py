"""Fused kernels for devices: one pass over memory, each vector read once and written once.

A kernel is a short C expression over one element. CuPy compiles it for float32 and for float64; T is the vectors'
dtype, and scalars, computed on the host in double, are rounded to it, as NumPy does. Each body reads all its
inputs before it writes: the compiler cannot assume that the vectors do not overlap, and would reload them.

A thread moves `EACH` elements, as far apart as there are threads, and reads all of them before it writes the first:
with one element a thread too few reads are under way, and SGD takes 1.6 times as long (H200).
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


VECTORS = {"g", "x", "o", "c", "sent", "delta", "m", "v"}  # the arguments that are vectors; the others are scalars


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
    "nesterov": _step("T m", "T eta, T beta, T look", "const T u = beta * m + d; m = u; x = y - eta * (look * u + d);"),
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

EACH = 4  # elements of a thread: of 1, 2, 4 and 8 the best on an H200 (SGD: 61, 97, 100, 94 % of a copy's bandwidth)


class Reduction(NamedTuple):
    """What CuPy makes one number of a vector `T x` of: of each element, and of two results."""

    output: str
    each: str
    both: str
    first: str  # result of no elements


REDUCTIONS = {
    "squares": Reduction("float64 y", "(double)x * x", "a + b", "0"),
    "finite": Reduction("bool y", "isfinite(x)", "a && b", "true"),
}


def unrolled(body: Body) -> Body:
    """`body` for a kernel over whole vectors, whose threads move EACH elements; i is the thread, _ind.size() all."""
    inputs, moved = [p for p in names(body.inputs) if p in VECTORS], names(body.inouts)
    loop = f'_Pragma("unroll") for (int _k = 0; _k < {EACH}; ++_k)'
    at = "const ptrdiff_t _j = i + _k * _ind.size();"
    code = [
        f"const ptrdiff_t _n = {moved[0]}.size();",
        *(f"T _{v}[{EACH}];" for v in inputs + moved),
        f"{loop} {{ {at}", *(f"_{v}[_k] = _j < _n ? {v}[_j] : T(0);" for v in inputs + moved), "}",
        f"{loop} {{", *(f"const T {v} = _{v}[_k];" for v in inputs), *(f"T {v} = _{v}[_k];" for v in moved),
        body.code, *(f"_{v}[_k] = {v};" for v in moved), "}",
        f"{loop} {{ {at} if (_j < _n) {{", *(f"{v}[_j] = _{v}[_k];" for v in moved), "} }",
    ]  # fmt: skip
    return Body(_raw(body.inputs), _raw(body.inouts), "\n".join(code))


def _raw(parameters: str) -> str:
    """CuPy's word for vectors that a kernel indexes itself."""
    return ", ".join(
        f"raw {parameter}" if name in VECTORS else parameter
        for parameter, name in zip(parameters.split(", "), names(parameters))
    )


@cache
def kernel(xp: ModuleType, name: str) -> Any:
    """The kernel `name` of `xp`; made once, compiled at the first launch for each dtype."""
    if name in REDUCTIONS:
        output, each, both, first = REDUCTIONS[name]
        return xp.ReductionKernel("T x", output, each, both, "y = a", first, f"agnmpi_{name}")
    return xp.ElementwiseKernel(*unrolled(KERNELS[name]), f"agnmpi_{name}")


def launch(name: str, first: Array, *rest: Array | float) -> None:
    """Run the kernel `name`, one launch on the current stream, on device vectors (n,) and scalars.

    The arguments stand in the order of its Body: inputs, then those that are moved in place.
    """
    kernel(namespace(first), name)(first, *rest, size=-(-first.size // EACH))


def reduced(name: str, x: Array) -> Any:
    """The reduction `name` of a device vector `x` (n,): a number on the device, not waited for."""
    return kernel(namespace(x), name)(x)
